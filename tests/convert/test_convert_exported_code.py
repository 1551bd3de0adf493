"""Exports with Long-VITA's projector open in transformers with the modelling files in them, and
give our prompts, pixels, logits and answers."""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from megatron_vita.checkpoint.store import read_manifest
from megatron_vita.config import MediaConfig, Recipe, recipe_from_dict
from megatron_vita.convert import exporting
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.families.folder_formats import LONG_VITA
from megatron_vita.convert.importing import import_weights
from megatron_vita.convert.settings.export_code import AUTO_MAP, FILES
from megatron_vita.convert.settings.export_prompts import complete_folder
from megatron_vita.convert.verify import compare_logits
from megatron_vita.errors import CheckpointError
from megatron_vita.inference.engine.engine import Engine
from tests.convert.asked_of_both import (
    OPTIONS,
    assert_answers_are_transformers,
    pixels_of,
)
from tests.convert.asked_of_transformers import WIDE, WITH_MEDIA, Inputs, Question, part
from tests.convert.exported_code import of_export, opened_with_code
from tests.convert.published import TILE, change
from tests.convert.published_models import ROWS, text_model
from tests.convert.toy_folders import model_of, save, save_vision, tensors_of
from tests.media.picture_files import photograph

IDS = ("<IMG_CONTEXT>", "<PATCH_CONTEXT>", "<VID_CONTEXT>")


class Exported(NamedTuple):
    """An export of a model from parts, opened by our engine and by transformers."""

    folder: Path
    checkpoint: Path
    engine: Engine
    model: PreTrainedModel
    processor: ProcessorMixin


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "llm").mkdir()
    text_model(folder / "llm", "qwen2.5")
    parts = [folder / "llm", save_vision(folder / "tower")]
    ours = folder / "ours"
    import_weights(parts, ours, projector="long_vita")
    export_checkpoint(ours, folder / "back")
    model, processor = opened_with_code(folder / "back")
    engine = Engine.from_checkpoint(ours, options=OPTIONS)
    return Exported(folder / "back", ours, engine, model, processor)


def test_answers_are_those_of_transformers_with_the_export_s_own_code(
    exported: Exported, tmp_path: Path
) -> None:
    def reference(question: Question) -> Inputs:
        return of_export(exported.processor, question, videos=tmp_path)

    assert_answers_are_transformers(exported.engine, exported.model, WITH_MEDIA, reference)


@pytest.mark.parametrize("name", WITH_MEDIA)
def test_prompt_ids_and_pixels_of_an_export_are_ours_bit_by_bit(
    name: str, exported: Exported, tmp_path: Path
) -> None:
    question = WITH_MEDIA[name]
    theirs = of_export(exported.processor, question, videos=tmp_path)
    prepared = exported.engine.prepare(question.prompt())
    assert prepared.document.input_ids.tolist() == theirs.ids
    if theirs.pixels is not None:
        assert torch.equal(pixels_of(exported.engine, prepared), theirs.pixels)


def test_logits_of_an_export_are_ours(exported: Exported) -> None:
    said = compare_logits(exported.checkpoint, exported.folder)
    asked = "32 tokens, a question, an image of 3 tiles, a video of 2 frames"
    assert f"for {asked}; a question has the token ids" in said
    apart = float(said.split("at most ")[1].split()[0])
    assert apart < 1e-5


def test_a_new_config_has_the_length_of_training_as_its_context(exported: Exported) -> None:
    length = recipe_of(exported.checkpoint).data.seq_length
    assert exported.model.config.get_text_config().max_position_embeddings == length


def test_another_image_gives_other_logits(exported: Exported, tmp_path: Path) -> None:
    inputs = of_export(exported.processor, WITH_MEDIA["one tile"], videos=tmp_path)
    ids = torch.tensor([inputs.ids])
    with torch.no_grad():
        one = exported.model(input_ids=ids, pixel_values=inputs.pixels).logits
        other = exported.model(input_ids=ids, pixel_values=inputs.pixels.flip(-1)).logits
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("language", "large"), [("qwen3", False), ("llama-tied", True), ("llama-llama3", False)]
)
def test_every_language_family_and_both_internvits_open_with_the_code(
    language: str, large: bool, tmp_path: Path
) -> None:
    parts = [
        save(model_of(language), tmp_path / "llm"),
        save_vision(tmp_path / "vit", large=large),
    ]
    import_weights(parts, tmp_path / "ours", projector="long_vita")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    said = compare_logits(tmp_path / "ours", tmp_path / "back")
    assert "an image of 3 tiles, a video of 2 frames; a question has" in said
    assert float(said.split("at most ")[1].split()[0]) < 1e-5


def test_a_base_config_that_leaves_defaults_out_is_completed(tmp_path: Path) -> None:
    parts = [save(model_of("qwen2"), tmp_path / "llm"), save_vision(tmp_path / "vit", large=True)]
    import_weights(parts, tmp_path / "ours", projector="long_vita")
    export_checkpoint(tmp_path / "ours", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for name in ("auto_map", "language_model_type", "media_token_ids"):
        del config[name]
    # All others are InternViT-6B's: RMSNorm, norms of query and key, no biases, patches of 14.
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    visual = {name: config["visual"][name] for name in kept} | {"image_size": [TILE, TILE]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"visual": visual}))
    export_checkpoint(tmp_path / "ours", tmp_path / "back", like=tmp_path / "base")
    said = compare_logits(tmp_path / "ours", tmp_path / "back")
    assert float(said.split("at most ")[1].split()[0]) < 1e-5


def recipe_of(checkpoint: Path) -> Recipe:
    return recipe_from_dict(read_manifest(checkpoint)["recipe"])


def with_media(checkpoint: Path, **fields: Any) -> None:
    """Replace fields of the recipe's `media` in a checkpoint."""
    change_manifest = json.loads((checkpoint / "manifest.json").read_text())
    change_manifest["recipe"]["media"] |= fields
    (checkpoint / "manifest.json").write_text(json.dumps(change_manifest))


ODD: dict[str, Any] = {
    "tiling": "anyres", "grids": ["2x1", "1x2", "2x2"], "max_fps": 2.0, "max_frames": 5,
    "video_fit": "squash", "normalization": [[0.5, 0.25, 0.5], [0.25, 0.5, 0.5]],
}  # fmt: skip


def test_other_media_settings_travel_with_an_export_and_back(
    exported: Exported, tmp_path: Path
) -> None:
    export_checkpoint(exported.checkpoint, tmp_path / "plain")
    import_weights([tmp_path / "plain"], tmp_path / "ours", projector="internvl")
    before = recipe_of(tmp_path / "ours")
    assert before.media == recipe_of(exported.checkpoint).media
    assert (before.text.template, before.text.media_format) == ("jinja", "long_vita")
    with_media(tmp_path / "ours", **ODD)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    import_weights([tmp_path / "back"], tmp_path / "again", projector="internvl")
    assert recipe_of(tmp_path / "again").media == dataclasses.replace(MediaConfig(), **ODD)
    _, processor = opened_with_code(tmp_path / "back")
    engine = Engine.from_checkpoint(tmp_path / "again", options=OPTIONS)
    question = Question([[part("image"), part("video"), part("text", "?")]], [(170, 60)], [3])
    (tmp_path / "videos").mkdir()
    theirs = of_export(processor, question, videos=tmp_path / "videos")
    prepared = engine.prepare(question.prompt())
    assert prepared.document.input_ids.tolist() == theirs.ids
    assert torch.equal(pixels_of(engine, prepared), theirs.pixels)


def test_tensors_of_an_export_survive_a_round_trip(exported: Exported, tmp_path: Path) -> None:
    import_weights([exported.folder], tmp_path / "ours", projector="internvl")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    before = tensors_of(exported.folder)
    after = tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() == stored_tensors(exported.model).keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for file in exported.folder.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of a model whose output layer is the embedding."""
    assert model.config.tie_word_embeddings
    return {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("largest", [1 << 30, 20_000])
def test_files_of_an_export_hold_each_tensor_once_and_no_byte_more(
    largest: int, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "LARGEST_FILE", largest)
    export_checkpoint(exported.checkpoint, tmp_path / "back")
    expected = stored_tensors(exported.model)
    tensors = tensors_of(tmp_path / "back")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    files = list((tmp_path / "back").glob("*.safetensors"))
    total = sum(tensor.nbytes for tensor in tensors.values())
    heads = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert sum(file.stat().st_size for file in files) == total + sum(heads)
    assert (len(files) > 1) == (largest < total)
    if len(files) > 1:
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"].keys() == expected.keys()


def test_saved_by_transformers_an_export_opens_again(exported: Exported, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    exported.model.save_pretrained(saved)
    exported.processor.save_pretrained(saved)
    model, processor = opened_with_code(saved)
    inputs = processor(images=photograph((TILE, TILE)), text="<image>a", return_tensors="pt")
    with torch.no_grad():
        expected = exported.model(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
    assert {file.name for file in saved.glob("*.py")} == set(FILES)


def test_saved_by_transformers_an_export_is_imported_with_its_settings(
    exported: Exported, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    model, processor = opened_with_code(exported.folder)
    processor.max_fps = 2.0
    processor.max_tiles = 3
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    import_weights([saved], tmp_path / "ours", projector="internvl")
    media = recipe_of(exported.checkpoint).media
    expected = dataclasses.replace(media, max_fps=2.0, max_tiles=3)
    assert recipe_of(tmp_path / "ours").media == expected
    engine = Engine.from_checkpoint(tmp_path / "ours", options=OPTIONS)
    for name in ("several turns", "one tile"):
        prompts = [each.prepare(WITH_MEDIA[name].prompt()) for each in (exported.engine, engine)]
        before, after = (prompt.document.input_ids.tolist() for prompt in prompts)
        assert before == after, name


def test_frames_are_taken_as_they_are_and_prompts_are_padded_at_the_left(
    exported: Exported,
) -> None:
    frames = [photograph((90, 60), seed) for seed in range(3)]
    arrays = np.stack([np.array(frame) for frame in frames])
    one = exported.processor(videos=frames, text=["<video>a", "a"], padding=True)
    other = exported.processor(videos=[arrays], text=["<video>a", "a"], padding=True)
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert one["pixel_values"].shape == (3, 3, TILE, TILE)
    assert one["attention_mask"][1][:-1] == [0] * (3 * (ROWS + 2))
    ids = exported.processor.tokenizer.convert_tokens_to_ids(list(IDS))
    assert exported.model.config.media_token_ids == ids
    assert one["input_ids"][0].count(ids[2]) == 3 * ROWS


def test_the_example_of_the_page_runs_as_it_is(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    (example,) = re.findall(r"```python\n(from transformers import Auto.*?)```", page, re.DOTALL)
    photograph((90, 60)).save(tmp_path / "cat.jpg")
    (tmp_path / "published").symlink_to(exported.folder)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "What is it?" in capsys.readouterr().out


def test_a_transparent_image_is_shown_over_white(exported: Exported) -> None:
    clear = exported.processor(images=Image.new("RGBA", (9, 9), (9, 9, 9, 0)), text="<image>")
    white = exported.processor(images=Image.new("RGB", (9, 9), "white"), text="<image>")
    assert torch.equal(clear["pixel_values"], white["pixel_values"])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (
            {"text": "<image> and <image>", "images": [Image.new("RGB", (9, 9))]},
            "more <image> tags",
        ),
        ({"text": "none", "images": [Image.new("RGB", (9, 9))]}, "1 images are given for which"),
        ({"text": "<video>"}, "more <video> tags than videos"),
        ({"text": "a", "audio": [0.0]}, "audio is given"),
        ({"images": [Image.new("RGB", (9, 9))]}, "text is needed"),
        ({"text": "<image>", "images": Image.new("I;16", (9, 9))}, "mode I;16"),
    ],
)
def test_media_without_their_tags_are_refused(
    exported: Exported, inputs: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        exported.processor(**inputs)


def test_tiles_without_their_placeholders_are_refused(exported: Exported) -> None:
    inputs = exported.processor(
        images=photograph((TILE, TILE)), text="<image>a", return_tensors="pt"
    )
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="4 placeholders and the 2 tiles 4 feature rows each"):
        exported.model(input_ids=ids, pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="which say where their features belong"):
        exported.model(inputs_embeds=torch.zeros(1, 2, 32), pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="4 placeholders and the 0 tiles"):
        exported.model(input_ids=ids)
    with pytest.raises(ValueError, match="0 placeholders and the 1 tiles"):
        exported.model(input_ids=ids[:, -1:], pixel_values=inputs["pixel_values"])


def test_tiles_that_prompts_would_share_are_refused(exported: Exported) -> None:
    context = exported.model.config.media_token_ids[0]
    ids = torch.tensor([[1, 1, 1, 1, context, context], [context] * 6])
    tiles = torch.zeros(2, 3, TILE, TILE)
    with pytest.raises(ValueError, match=r"have \[2, 6\] placeholders: each needs a multiple of 4"):
        exported.model(input_ids=ids, pixel_values=tiles)


def test_a_placeholder_that_the_model_writes_needs_no_pixels(exported: Exported) -> None:
    found = exported.model(input_ids=torch.tensor([[1, 2]]), use_cache=True)
    written = torch.tensor([exported.model.config.media_token_ids[:1]])
    logits = exported.model(input_ids=written, past_key_values=found.past_key_values).logits
    assert logits.shape[1] == 1


def test_a_model_of_other_placeholders_gets_no_code(tmp_path: Path) -> None:
    recipe = Recipe().replaced({"text.media_format": "internvl"})
    with pytest.raises(CheckpointError, match=r"text\.media_format is .internvl., but"):
        complete_folder(tmp_path, folder_format=LONG_VITA, recipe=recipe, config={})
    assert not list(tmp_path.iterdir())


def two_prompts(exported: Exported) -> tuple[Any, torch.Tensor]:
    """Prompts of different length with 4 tiles and 1, and last logits [2, vocabulary] of each."""
    images = [photograph(WIDE, 1), photograph((TILE, TILE), 2)]
    texts = ["<image>a", "<image>what is this"]
    options = {"padding": True, "return_tensors": "pt"}
    logits = []
    for image, text in zip(images, texts, strict=True):
        alone = exported.processor(images=image, text=text, **options)
        with torch.no_grad():
            logits.append(exported.model(**alone).logits[0, -1])
    return exported.processor(images=images, text=texts, **options), torch.stack(logits)


@pytest.mark.parametrize("many", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples_of_a_prompt_see_its_own_tiles(
    many: dict[str, Any], exported: Exported
) -> None:
    inputs, expected = two_prompts(exported)
    found = exported.model.generate(
        **inputs, **many, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    assert inputs["pixel_values"].shape[0] == 5
    assert (found.logits[0] - expected.repeat_interleave(2, dim=0)).abs().max() < 1e-5


def test_left_padding_changes_no_logits(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, expected = two_prompts(exported)
    # The 5 tiles are encoded in 2 parts, of which one has tiles of both prompts.
    monkeypatch.setattr(sys.modules[type(exported.model).__module__], "TILES_AT_ONCE", 3)
    with torch.no_grad():
        logits = exported.model(**inputs).logits[:, -1]
    assert (logits - expected).abs().max() < 1e-5
    # Without a mask transformers finds the padding by its id.
    mask = inputs.pop("attention_mask")
    ids = {"pad_token_id": exported.processor.tokenizer.pad_token_id, "eos_token_id": 1}
    found = exported.model.generate(
        **inputs, **ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    assert not mask.all()
    assert (found.logits[0] - expected).abs().max() < 1e-5


def test_columns_of_a_data_set_that_the_model_takes_are_named(exported: Exported) -> None:
    # transformers' Trainer drops all others.
    named = inspect.signature(exported.model.forward).parameters
    columns = {"input_ids", "attention_mask", "position_ids", "pixel_values", "labels"}
    assert columns | {"past_key_values", "num_items_in_batch"} <= named.keys()


def test_the_loss_is_divided_by_the_items_that_the_trainer_counts(exported: Exported) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[1, 2, -100, 4]])
    with torch.no_grad():
        mean = exported.model(input_ids=ids, labels=labels)
        divided = exported.model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(10))
    losses = F.cross_entropy(mean.logits[0, :-1], labels[0, 1:], reduction="none")
    torch.testing.assert_close(mean.loss, losses.sum() / 2)
    torch.testing.assert_close(divided.loss, losses.sum() / 10)


def test_code_of_another_author_in_a_folder_is_left_alone(
    exported: Exported, tmp_path: Path
) -> None:
    import_weights([exported.folder], tmp_path / "ours", projector="internvl")
    kept = tmp_path / "ours" / "hugging_face" / "long-vita"
    change(kept, auto_map={"AutoModelForCausalLM": "modeling_long_vita.LongVITAForCausalLM"})
    (kept / "modeling_vita.py").unlink()
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["auto_map"] != AUTO_MAP
    assert not (tmp_path / "back" / "modeling_vita.py").exists()


def test_placeholder_ids_that_are_not_the_tokenizer_s_are_refused(
    exported: Exported, tmp_path: Path
) -> None:
    export_checkpoint(exported.checkpoint, tmp_path / "back")
    change(tmp_path / "back", media_token_ids=[1, 2, 3])
    with pytest.raises(CheckpointError, match=r"media_token_ids is \[1, 2, 3\]: the tokenizer"):
        import_weights([tmp_path / "back"], tmp_path / "ours", projector="internvl")
