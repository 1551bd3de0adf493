"""`--verify` asks about an image of several tiles and a video, and says what it compared."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_vita.convert.__main__ import run
from megatron_vita.convert.importing import import_weights
from megatron_vita.convert.verify import compare_logits
from megatron_vita.errors import CheckpointError
from tests.convert.published_models import (
    Published,
    internvl_chat,
    internvl_hf,
    long_vita,
    text_model,
)
from tests.convert.toy_folders import model_of, save, save_vision, tensors_of

TEXTS = "for 32 tokens, a question"
MEDIA = "an image of 3 tiles, a video of 2 frames"
EQUAL = "all tensors are equal both ways; forward passes gave transformers' logits, at most "
TEMPLATE = "a question has the token ids of the chat template"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return internvl_hf(tmp_path_factory.mktemp("hf"))


def verified(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert run([*map(str, arguments), "--verify"]) == 0
    return capsys.readouterr().out


def test_internvl_is_asked_about_an_image_and_a_video(
    hf: Published, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = verified(capsys, "from-hf", hf.folder, tmp_path / "ours")
    assert EQUAL in said
    assert f"{TEXTS}, {MEDIA}; {TEMPLATE}\n" in said
    said = verified(capsys, "to-hf", tmp_path / "ours", tmp_path / "back")
    assert f"{TEXTS}, {MEDIA}; {TEMPLATE}\n" in said


@pytest.mark.parametrize("made", [internvl_chat, long_vita])
def test_a_class_that_is_code_of_the_folder_is_named_as_not_compared(
    made: object, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "theirs").mkdir()
    names = ["internvl3-1b-chat"] if made is internvl_chat else []
    made(tmp_path / "theirs", *names)  # type: ignore[operator]
    said = verified(capsys, "from-hf", tmp_path / "theirs", tmp_path / "ours")
    images = "an image of 3 tiles, a video of 2 frames"
    assert "not compared, for transformers has no class for theirs, but finite: 32 tokens" in said
    assert images in said
    if made is internvl_chat:  # the same weights in the format that transformers has
        said = verified(
            capsys, "to-hf", tmp_path / "ours", tmp_path / "back", "--format", "internvl-hf"
        )
        assert f"{TEXTS}, {MEDIA}; {TEMPLATE}\n" in said


def test_a_language_model_is_asked_texts_and_its_tower_is_named_as_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "llm").mkdir()
    text_model(tmp_path / "llm", "llama3.1")
    said = verified(capsys, "from-hf", tmp_path / "llm", tmp_path / "ours")
    assert f"{TEXTS}; {TEMPLATE}\n" in said
    tower = save_vision(tmp_path / "vit")
    said = verified(capsys, "from-hf", tmp_path / "llm", tower, tmp_path / "both")
    assert f"{TEXTS}; not compared, for transformers' LlamaForCausalLM takes no images" in said
    assert MEDIA in said


def test_a_folder_without_a_tokenizer_is_asked_no_question(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(model_of("qwen2"), tmp_path / "llm")
    for file in folder.glob("*token*"):
        file.unlink()
    said = verified(capsys, "from-hf", folder, tmp_path / "ours")
    assert f"{EQUAL}" in said
    assert said.endswith("of the largest apart, for 32 tokens\n")


@pytest.mark.parametrize(
    ("beginning", "probe"),
    [("model.vision_tower.", "an image of 3 tiles"), ("model.language_model.", "32 tokens")],
)
def test_logits_that_differ_are_named_by_what_was_asked(
    hf: Published, tmp_path: Path, beginning: str, probe: str
) -> None:
    import_weights([hf.folder], tmp_path / "ours", projector="internvl")
    other = tmp_path / "other"
    shutil.copytree(hf.folder, other)
    part = beginning.removeprefix("model.")
    tensors = {
        name: tensor * 1.5 if name.removeprefix("model.").startswith(part) else tensor
        for name, tensor in tensors_of(hf.folder).items()
    }
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"logits of {probe} are .* away from those of"):
        compare_logits(tmp_path / "ours", other)


def test_a_template_that_asks_otherwise_is_told_of(hf: Published, tmp_path: Path) -> None:
    import_weights([hf.folder], tmp_path / "ours", projector="internvl")
    other = tmp_path / "other"
    shutil.copytree(hf.folder, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text("<|im_end|>" + template)
    with pytest.raises(CheckpointError, match=r"a question becomes '<\|im_end\|>.*by the recipe"):
        compare_logits(tmp_path / "ours", other)
