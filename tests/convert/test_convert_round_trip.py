"""Import and export give the same tensors bit by bit, the same names and config, loadable by
transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

from megatron_vita.checkpoint.store import find_checkpoint, read_manifest
from megatron_vita.config import load_recipe, recipe_from_dict
from megatron_vita.convert import exporting
from megatron_vita.convert.__main__ import run as main
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.errors import CheckpointError
from tests.convert.toy_folders import (
    LANGUAGE,
    SCALED,
    WHOLE,
    model_of,
    save,
    save_chat,
    save_vision,
    tensors_of,
    tower_of,
)

FAMILIES = [*LANGUAGE, *SCALED, *WHOLE, "internvl-chat", "internvl-chat-large"]
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
)


def make(family: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    if family.startswith("internvl-chat"):
        return save_chat(model_of(family.replace("chat", "hf")), folder, dtype=dtype)
    return save(model_of(family), folder, dtype=dtype)


def bring_in(*folders: Path, to: Path) -> Path:
    import_weights(folders, to, projector="internvl")
    return to


def assert_same_folder(one: Path, other: Path) -> None:
    before = tensors_of(one)
    after = tensors_of(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert json.loads((one / "config.json").read_text()) == json.loads(
        (other / "config.json").read_text()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_tensors_names_config_and_companions(
    family: str, tmp_path: Path
) -> None:
    folder = make(family, tmp_path / "theirs")
    ours = bring_in(folder, to=tmp_path / "ours")
    export_checkpoint(ours, tmp_path / "again")
    assert_same_folder(folder, tmp_path / "again")
    for name in COMPANIONS:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "again").temperature == 0.25


@pytest.mark.parametrize("family", [*LANGUAGE, *SCALED, *WHOLE])
def test_what_is_written_loads_in_transformers_without_a_config_to_start_from(
    family: str, tmp_path: Path
) -> None:
    model = model_of(family)
    ours = bring_in(save(model, tmp_path / "theirs", dtype=torch.float32), to=tmp_path / "ours")
    for file in (ours / "hugging_face").rglob("config.json"):
        file.unlink()
    export_checkpoint(ours, tmp_path / "again")
    loader = AutoModelForImageTextToText if family in WHOLE else AutoModelForCausalLM
    loaded, report = loader.from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_layouts_of_internvl_become_each_other(tmp_path: Path) -> None:
    model = model_of("internvl-hf")
    chat = save_chat(model, tmp_path / "chat")
    hf = save(model, tmp_path / "hf")
    export_checkpoint(
        bring_in(chat, to=tmp_path / "1"), tmp_path / "to hf", folder_format="internvl-hf"
    )
    export_checkpoint(
        bring_in(hf, to=tmp_path / "2"), tmp_path / "to chat", folder_format="internvl-chat"
    )
    for one, other in ((hf, tmp_path / "to hf"), (chat, tmp_path / "to chat")):
        before = tensors_of(one)
        after = tensors_of(other)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_parts_are_put_together_with_a_fresh_projector_and_taken_out_again(tmp_path: Path) -> None:
    language = save(model_of("qwen2"), tmp_path / "llm")
    vision = save_vision(tmp_path / "vit")
    import_weights([language, vision], tmp_path / "ours", projector="long_vita")
    model = recipe_from_dict(read_manifest(tmp_path / "ours")["recipe"]).model
    assert (model.text_only, model.projector.kind) == (False, "long_vita")
    (tmp_path / "ours" / "hugging_face" / "internvit-hf" / "preprocessor_config.json").write_text(
        "{}"
    )
    (tmp_path / "ours" / "hugging_face" / "causal" / "preprocessor_config.json").unlink()
    export_checkpoint(tmp_path / "ours", tmp_path / "whole")
    assert (tmp_path / "whole" / "preprocessor_config.json").read_text() == "{}"
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
    export_checkpoint(tmp_path / "ours", tmp_path / "vit again", folder_format="internvit-hf")
    export_checkpoint(tmp_path / "ours", tmp_path / "llm again", folder_format="causal")
    assert_same_folder(vision, tmp_path / "vit again")
    assert_same_folder(language, tmp_path / "llm again")


def test_the_vocabulary_grows_by_mean_rows_where_the_tokenizer_with_media_tokens_needs_it(
    tmp_path: Path,
) -> None:
    model = model_of("qwen2")
    model.resize_token_embeddings(10, mean_resizing=False)
    language = save(model, tmp_path / "llm")
    vision = save_vision(tmp_path / "vit")
    import_weights([language, vision], tmp_path / "ours", projector="long_vita")
    export_checkpoint(tmp_path / "ours", tmp_path / "again", folder_format="causal")
    before = tensors_of(language)
    after = tensors_of(tmp_path / "again")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape[0] > 7 + 17
        assert torch.equal(after[name][:10], before[name])
        torch.testing.assert_close(
            after[name][10:], before[name].mean(0).expand_as(after[name][10:])
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.config.vocab_size == after["lm_head.weight"].shape[0]


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings_is_theirs_if_equal_and_its_own_if_not(
    equal: bool, tmp_path: Path
) -> None:
    """Some published files hold the output layer although the config ties it."""
    folder = save(model_of("qwen2-tied"), tmp_path / "theirs")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, folder / "model.safetensors")
    ours = bring_in(folder, to=tmp_path / "ours")
    model = recipe_from_dict(read_manifest(ours)["recipe"]).model
    assert model.language.untie_embeddings_and_output_weights != equal
    export_checkpoint(ours, tmp_path / "again")
    assert_same_folder(folder, tmp_path / "again")


def test_large_models_are_written_in_several_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LARGEST_FILE", 30_000)
    folder = save(model_of("qwen3"), tmp_path / "theirs")
    export_checkpoint(bring_in(folder, to=tmp_path / "ours"), tmp_path / "again")
    files = list((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 40_000 for file in files)
    assert_same_folder(folder, tmp_path / "again")
    export_checkpoint(bring_in(tmp_path / "again", to=tmp_path / "ours 2"), tmp_path / "thrice")
    assert_same_folder(folder, tmp_path / "thrice")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_the_recipe_beside_the_weights_is_a_base_for_a_stage(tmp_path: Path) -> None:
    ours = bring_in(save(model_of("qwen3"), tmp_path / "theirs"), to=tmp_path / "ours")
    recipe = load_recipe(ours / "model.yaml")
    assert recipe.model.language.qk_layernorm
    assert recipe.model == recipe_from_dict(read_manifest(find_checkpoint(ours))["recipe"]).model
    assert Path(recipe.text.tokenizer, "tokenizer.json").exists()


def test_the_command_line_converts_and_verifies_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(model_of("llama-tied"), tmp_path / "theirs")
    assert main(["from-hf", str(folder), str(tmp_path / "ours"), "--verify"]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "again"), "--verify"]) == 0
    said = capsys.readouterr()
    assert (
        said.out.count(
            "all tensors are equal both ways; forward passes gave transformers' logits, at most "
        )
        == 2
    )
    assert "B/s" in said.err
    assert_same_folder(folder, tmp_path / "again")
    assert main(["from-hf", str(folder), str(tmp_path / "ours")]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("projector", "tower", "said"),
    [
        (
            "long_vita",
            "internvit",
            "opens with the modelling files in them (trust_remote_code=True)",
        ),
        ("long_vita", "internvit", "--projector internvl makes a model that it opens by itself"),
        ("internvl", "internvit", "format internvl-hf, which transformers opens by itself"),
        ("long_vita", "clip", "no format holds all of the model (format long-vita cannot say"),
        ("internvl", "siglip", "no format holds all of the model (format internvl-hf cannot say"),
    ],
)
def test_who_opens_the_exports_of_a_new_model_is_said_before_training(
    projector: str, tower: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = save(model_of("qwen2"), tmp_path / "llm")
    tower_of(tower).save_pretrained(tmp_path / "tower")
    import_weights([llm, tmp_path / "tower"], tmp_path / "ours", projector=projector)
    assert said in caplog.text
    if "no format" in said:
        with pytest.raises(CheckpointError, match=r"has no tensor .*export its parts alone"):
            export_checkpoint(tmp_path / "ours", tmp_path / "back")


def test_the_command_line_says_how_an_export_with_code_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parts = [save(model_of("qwen2"), tmp_path / "llm"), save_vision(tmp_path / "vit")]
    assert main(["from-hf", *map(str, parts), str(tmp_path / "ours")]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert "AutoModelForImageTextToText and AutoProcessor" in capsys.readouterr().out
