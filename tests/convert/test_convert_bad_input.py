"""Faulty inputs are refused by tensor and file, and nothing is written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vita.convert.__main__ import run as main
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.errors import CheckpointError, VitaError
from tests.convert.toy_folders import model_of, save, save_vision, tensors_of

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model_of("qwen2"), tmp_path_factory.mktemp("good") / "theirs")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "theirs")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(folder).items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def split_with_index(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    parts = {"one.safetensors": list(tensors)[:10], "two.safetensors": list(tensors)[10:]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(folder: Path, *said: str) -> None:
    """Assert that the error contains all of `said`, and that nothing was written beside the source."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(VitaError) as error:
        import_weights([folder], folder.parent / "ours", projector="internvl")
    for part in said:
        assert part in str(error.value), error.value
    assert sorted(folder.parent.iterdir()) == before


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, lambda t: t.pop(UP))
    refused(folder, UP, str(folder))


def test_an_extra_tensor(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}))
    refused(folder, "model.layers.2.mlp.up_proj.weight", "model.safetensors", "does not call for")


def test_old_buffers_are_no_extra_tensors(folder: Path) -> None:
    change(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    import_weights([folder], folder.parent / "ours", projector="internvl")


def test_a_misshaped_tensor(folder: Path) -> None:
    change(folder, lambda t: t.update({UP: t[UP][:-1].contiguous()}))
    refused(folder, UP, "[63, 32]", "[64, 32]", "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(folder: Path, value: float) -> None:
    change(folder, lambda t: t[UP].view(-1)[7:9].fill_(value))
    refused(folder, UP, "2 values", "NaN or infinite", "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_a_dtype_that_holds_no_weights(folder: Path, dtype: torch.dtype) -> None:
    change(folder, lambda t: t.update({UP: t[UP].to(dtype)}))
    refused(folder, UP, str(dtype).removeprefix("torch."), "bfloat16", "model.safetensors")


def test_tensors_that_are_joined_must_be_of_one_dtype(folder: Path) -> None:
    change(folder, lambda t: t.update({UP: t[UP].half()}))
    refused(folder, UP, "float16", "model.layers.1.mlp.gate_proj.weight", "float32")


def test_layers_must_be_of_one_dtype(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change(folder, lambda t: t.update({name: t[name].half()}))
    refused(folder, name, "model.layers.0.mlp.down_proj.weight", "model.safetensors")


@pytest.mark.parametrize("left", [0, 5, 100, -1, -50_000])
def test_a_truncated_file(folder: Path, left: int) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    refused(folder, "model.safetensors", "truncated")


def test_a_damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:30] = b"\xff" * 10
    file.write_bytes(data)
    refused(folder, "model.safetensors", "header")


def test_a_header_whose_places_do_not_fit_its_shapes(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    changed = data.replace(b'"shape":[97,32]', b'"shape":[97,31]', 1)
    assert changed != data
    (folder / "model.safetensors").write_bytes(changed)
    refused(folder, "model.safetensors", "[97, 31]", "bytes")


def test_an_index_that_names_a_missing_file(folder: Path) -> None:
    split_with_index(folder)
    (folder / "two.safetensors").unlink()
    refused(folder, "model.safetensors.index.json", "two.safetensors", "no such file")


def test_an_index_that_names_a_tensor_its_file_lacks(folder: Path) -> None:
    split_with_index(folder)
    tensors = tensors_of(folder)
    names = list(tensors)[11:]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = [name for name in names if index[name] == "two.safetensors"]
    save_file({name: tensors[name] for name in kept[1:]}, folder / "two.safetensors")
    refused(folder, "two.safetensors", "has no tensor")


def test_an_index_that_leads_out_of_its_folder(folder: Path) -> None:
    split_with_index(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("two.safetensors", "../two.safetensors"))
    refused(folder, "model.safetensors.index.json", "outside")


class Code:
    """A pickle that would create a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_run(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({UP: Code(folder / "ran")}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "not run", "mkdir")
    assert not (folder / "ran").exists()


def test_a_pickle_of_tensors_is_read(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    import_weights([folder], folder.parent / "ours", projector="internvl")
    export_checkpoint(folder.parent / "ours", folder.parent / "again")
    assert all(
        torch.equal(tensor, tensors[name])
        for name, tensor in tensors_of(folder.parent / "again").items()
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5}}, "factor"),
        ({"num_attention_heads": 3}, "num_query_groups"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_a_config_that_the_model_cannot_follow_is_refused_by_field(
    folder: Path, fields: dict, said: str
) -> None:
    change_config(folder, **fields)
    refused(folder, "config.json", said)


def test_parts_that_do_not_make_a_model(folder: Path, tmp_path: Path) -> None:
    vision = save_vision(tmp_path / "vit")
    for sources, said in (
        ([vision], "vision tower alone"),
        ([folder, folder], "both hold"),
        ([tmp_path / "no"], "no"),
    ):
        with pytest.raises(CheckpointError, match=said):
            import_weights(sources, tmp_path / "ours", projector="internvl")
    assert not (tmp_path / "ours").exists()


@pytest.fixture
def ours(folder: Path) -> Path:
    import_weights([folder], folder.parent / "ours", projector="internvl")
    return folder.parent / "ours"


def refused_out(ours: Path, *said: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        export_checkpoint(ours, ours.parent / "again", **options)
    for part in said:
        assert part in str(error.value), error.value
    assert not (ours.parent / "again").exists()
    assert not list(ours.parent.glob(".*"))


def test_metadata_of_a_checkpoint_that_would_run_code(ours: Path) -> None:
    (ours / ".metadata").write_bytes(pickle.dumps(Code(ours / "ran")))
    refused_out(ours, ".metadata", "mkdir")
    assert not (ours / "ran").exists()


def test_a_truncated_checkpoint(ours: Path) -> None:
    file = ours / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    refused_out(ours, "__0_0.distcp", "tensor")


def test_a_checkpoint_of_other_shapes_than_its_recipe(ours: Path) -> None:
    manifest = json.loads((ours / "manifest.json").read_text())
    manifest["recipe"]["model"]["language"]["ffn_hidden_size"] = 66
    (ours / "manifest.json").write_text(json.dumps(manifest))
    refused_out(ours, "linear_fc1.weight", "[2, 128, 32]", "[2, 132, 32]")


def test_layouts_that_do_not_fit(ours: Path) -> None:
    refused_out(ours, "text_only", folder_format="internvl-hf")
    refused_out(ours, "'nonsense'", "internvl-chat", folder_format="nonsense")


@pytest.mark.parametrize("option", ["--format", "--layout"])
def test_an_unknown_format_is_one_line_with_the_known_ones(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    code = main(["to-hf", str(ours), str(tmp_path / "out"), option, "nonsense"])
    assert code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: format is 'nonsense'; known: ")
    assert "\n" not in error


def test_layouts_of_other_models_are_refused_by_what_they_cannot_say(
    folder: Path, tmp_path: Path
) -> None:
    import_weights([folder, save_vision(tmp_path / "vit")], tmp_path / "ours", projector="internvl")
    refused_out(tmp_path / "ours", "layers.0.scale1", folder_format="clip")
    refused_out(tmp_path / "ours", "clip", "is of format causal", folder_format="clip", like=folder)
    refused_out(tmp_path / "ours", "projector of kind long_vita", folder_format="long-vita")
    large = save_vision(tmp_path / "large", large=True)
    import_weights([folder, large], tmp_path / "ours 2", projector="internvl")
    change_config(tmp_path / "ours 2" / "hugging_face" / "internvit-hf", use_mean_pooling=False)
    refused_out(tmp_path / "ours 2", "use_mean_pooling", folder_format="internvit-hf")


def test_a_full_disk_is_said_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_vita.convert.formats.synced_file.os.fsync", full)
    refused(folder, "ours", "No space left")


def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ours = folder.parent / "ours"
    monkeypatch.setattr(
        "megatron_vita.convert.writing._as_yaml", lambda *_: os.kill(os.getpid(), 9)
    )
    child = os.fork()
    if child == 0:
        import_weights([folder], ours, projector="internvl")
    os.waitpid(child, 0)
    assert not ours.exists()
    assert (folder.parent / ".ours.incomplete").exists()
    monkeypatch.undo()
    assert main(["from-hf", str(folder), str(ours)]) == 0
    assert not (folder.parent / ".ours.incomplete").exists()
    assert main(["to-hf", str(folder.parent / "nothing"), str(folder.parent / "again")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
