"""A folder's prompt format becomes recipe fields, every token has a row, and added tokens are
exported."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_vita.checkpoint.store import read_manifest
from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.errors import CheckpointError
from megatron_vita.text.origin import INTERNVL_SYSTEMS
from megatron_vita.text.vocabulary import open_tokenizer
from tests.convert.published import change
from tests.convert.toy_folders import ROWS, SHAPE, model_of, save, save_chat, save_vision, theta

MEDIA = ("<img>", "</img>", "<IMG_CONTEXT>")


def brought_in(*folders: Path, to: Path, projector: str = "internvl") -> Recipe:
    import_weights(folders, to, projector=projector)
    recipe = recipe_from_dict(read_manifest(to)["recipe"])
    recipe.text.tokenizer = str(to / recipe.text.tokenizer)
    return recipe


def test_prompts_of_each_layout_are_fields_of_the_recipe(tmp_path: Path) -> None:
    llm = brought_in(save(model_of("qwen2"), tmp_path / "llm"), to=tmp_path / "1").text
    assert (llm.template, llm.stop_tokens, llm.system) == ("jinja", ["<|im_end|>"], "")
    hf = brought_in(save(model_of("internvl-hf"), tmp_path / "hf"), to=tmp_path / "2").text
    assert (hf.media_format, hf.system) == ("internvl", "")
    chat = brought_in(save_chat(model_of("internvl-hf"), tmp_path / "chat"), to=tmp_path / "3").text
    assert (chat.media_format, chat.system) == ("internvl", INTERNVL_SYSTEMS["internvl2_5"])


def test_prompts_of_an_unknown_form_are_refused_by_field(tmp_path: Path) -> None:
    folder = save_chat(model_of("internvl-hf"), tmp_path / "chat")
    change(folder, template="Hermes-2")
    with pytest.raises(CheckpointError, match="template is 'Hermes-2'"):
        brought_in(folder, to=tmp_path / "ours")
    hf = save(model_of("internvl-hf"), tmp_path / "hf")
    change(hf, image_token_id=5)
    with pytest.raises(CheckpointError, match=r"image_token_id is 5.*<IMG_CONTEXT> at 90"):
        brought_in(hf, to=tmp_path / "ours")


def test_what_parts_were_given_leaves_with_the_export_and_is_known_to_transformers(
    tmp_path: Path,
) -> None:
    small = Qwen2Config(**(SHAPE | {"vocab_size": 7}), **theta(1e6), tie_word_embeddings=False)
    llm = save(Qwen2ForCausalLM(small), tmp_path / "llm")
    entries = len(AutoTokenizer.from_pretrained(llm))
    recipe = brought_in(llm, save_vision(tmp_path / "vit"), to=tmp_path / "ours")
    tokenizer = open_tokenizer(recipe)
    ids = [tokenizer.special_id(name) for name in MEDIA]
    rows = tokenizer.vocab_size
    assert recipe.model.language.vocab_size == rows == entries + len(MEDIA)
    assert ids == [entries, entries + 1, entries + 2]
    export_checkpoint(tmp_path / "ours", tmp_path / "back", folder_format="internvl-hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs.convert_tokens_to_ids(list(MEDIA)) == ids
    assert theirs.context_image_token == "<IMG_CONTEXT>"
    assert AutoConfig.from_pretrained(tmp_path / "back").image_token_id == ids[2]
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    rendered = theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert rendered == "<|im_start|>user\n<IMG_CONTEXT>\na<|im_end|>\n"
    row = [ids[0], *[ids[2]] * ROWS, ids[1], 1]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "back")
    logits = model(input_ids=torch.tensor([row]), pixel_values=torch.zeros(1, 3, 56, 56)).logits
    assert logits.shape == (1, len(row), rows)
