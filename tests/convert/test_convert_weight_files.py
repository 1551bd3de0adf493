"""Choice among the weight files of a folder: that of transformers, with a warning that names the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.formats.weight_files import open_weights
from megatron_vita.convert.importing import import_weights
from megatron_vita.convert.sources import open_source
from megatron_vita.errors import CheckpointError
from tests.convert.toy_folders import model_of, save, tensors_of

EMBEDDING = "model.embed_tokens.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model_of("qwen2"), tmp_path_factory.mktemp("good") / "theirs")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "theirs"))


def add_shards(folder: Path, *, scale: float, total_size: int | None = None) -> None:
    """Add an index of two shards that hold the folder's tensors times `scale`."""
    tensors = {name: tensor * scale for name, tensor in tensors_of(folder).items()}
    names = list(tensors)
    parts = dict(zip(SHARDS, (names[:10], names[10:]), strict=True))
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    metadata = {} if total_size is None else {"total_size": total_size}
    places = {name: file for file, held in parts.items() for name in held}
    index = {"metadata": metadata, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def theirs(folder: Path) -> torch.Tensor:
    """Embedding that transformers loads."""
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()


def test_a_whole_file_comes_before_an_older_index(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_shards(folder, scale=0.0)
    import_weights([folder], folder.parent / "ours", projector="internvl")
    export_checkpoint(folder.parent / "ours", folder.parent / "again")
    assert torch.equal(tensors_of(folder.parent / "again")[EMBEDDING], theirs(folder))
    assert "model.safetensors is read" in caplog.text
    assert SHARDS[0] in caplog.text


@pytest.mark.parametrize("removed", [["model.safetensors"], [], [*SHARDS]])
def test_safetensors_come_before_pickles_in_transformers_order(
    folder: Path, removed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    add_shards(folder, scale=2.0)
    torch.save(
        {name: tensor * 3 for name, tensor in tensors_of(folder).items()},
        folder / "pytorch_model.bin",
    )
    for file in removed:
        (folder / file).unlink()
    if removed == [*SHARDS]:
        (folder / "model.safetensors.index.json").unlink()
    found = open_weights(folder).read(EMBEDDING)
    assert torch.equal(found, theirs(folder))
    assert "not read: " in caplog.text
    assert "pytorch_model.bin" in caplog.text


def test_a_whole_pickle_comes_before_an_index_of_pickles(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(
        {name: tensor * 0 for name, tensor in tensors.items()}, folder / "pytorch_model-1.bin"
    )
    assert torch.equal(open_weights(folder).read(EMBEDDING), theirs(folder))


def test_shards_that_no_index_names_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    torch.save({}, folder / "training_args.bin")
    open_weights(folder)
    assert "not read: consolidated.safetensors" in caplog.text
    assert "training_args" not in caplog.text


def test_an_index_whose_sum_of_bytes_is_wrong_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nbytes = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    for said, warns in ((nbytes, False), (nbytes - 4, True)):
        caplog.clear()
        add_shards(folder, scale=1.0, total_size=said)
        (folder / "model.safetensors").rename(folder.parent / "aside")
        open_weights(folder)
        (folder.parent / "aside").rename(folder / "model.safetensors")
        assert ("total_size" in caplog.text) == warns


def test_bytes_that_no_tensor_has_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has 8 bytes after its last"):
        open_weights(folder)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header.pop("model.norm.weight")
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(CheckpointError, match=r"begins at byte|bytes after its last tensor"):
        open_weights(folder)


def test_an_adapter_is_refused_whether_alone_or_beside_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"adapter_config\.json: the folder is an adapter"
        ):
            open_source(folder)
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "model.safetensors").unlink(missing_ok=True)


def test_a_folder_without_weights_says_which_would_do(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors.*pytorch_model\.bin"):
        open_source(folder)
