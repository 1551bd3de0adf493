"""A folder's prompt format becomes recipe fields, every token has a row, and added tokens are
exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_vita.checkpoint.store import MANIFEST, read_manifest
from megatron_vita.checkpoint.tokenizer_copy import copy_tokenizer
from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.errors import CheckpointError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.origin import INTERNVL_SYSTEMS
from megatron_vita.text.vocabulary import open_tokenizer
from tests.convert.published import change
from tests.convert.toy_folders import (
    ROWS,
    SHAPE,
    VISION,
    internvl,
    model_of,
    save,
    save_chat,
    save_vision,
    theta,
)
from tests.text.published import save_family

MEDIA = ("<img>", "</img>", "<IMG_CONTEXT>")


def brought_in(*folders: Path, to: Path, projector: str = "internvl") -> Recipe:
    import_weights(folders, to, projector=projector)
    recipe = recipe_from_dict(read_manifest(to)["recipe"])
    return recipe.replaced({"text.tokenizer": str(to / recipe.text.tokenizer)})


def test_prompts_of_each_layout_are_fields_of_the_recipe(tmp_path: Path) -> None:
    llm = brought_in(save(model_of("qwen2"), tmp_path / "llm"), to=tmp_path / "1").text
    assert (llm.template, llm.stop_tokens, llm.system) == ("jinja", ["<|im_end|>"], "")
    hf = brought_in(save(model_of("internvl-hf"), tmp_path / "hf"), to=tmp_path / "2").text
    assert (hf.media_format, hf.system) == ("internvl", "")
    chat = brought_in(save_chat(model_of("internvl-hf"), tmp_path / "chat"), to=tmp_path / "3").text
    assert (chat.media_format, chat.system) == ("internvl", INTERNVL_SYSTEMS["internvl2_5"])


@pytest.mark.parametrize("spare", [0, 64])
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_prompts_and_ends_are_the_folders_whatever_rows_the_embedding_has(
    family: str, spare: int, tmp_path: Path
) -> None:
    theirs = save_family(tmp_path, family)
    shape = SHAPE | {"vocab_size": len(theirs) + spare}
    ends = theirs.eos_token_id
    llama = LlamaConfig(**shape, **theta(5e5), tie_word_embeddings=False, eos_token_id=ends)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    recipe = brought_in(tmp_path, to=tmp_path / "ours")
    chat = ChatFormat(open_tokenizer(recipe), recipe.text)
    messages = [{"role": "user", "content": "hello"}]
    turns = chat.prompt(check_messages({"messages": messages}, needs_answer=False))
    ids = [i for turn in turns for piece in turn for i in piece.ids]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == asked["input_ids"]
    assert theirs.eos_token_id in chat.stop_ids
    assert max(ids) < len(theirs)


@pytest.mark.parametrize("spare", [0, 32])
def test_placeholders_of_an_image_are_those_that_internvl_was_trained_with(
    spare: int, tmp_path: Path
) -> None:
    theirs = save_family(tmp_path, "internvl-hf")
    context = theirs.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = internvl(VISION, vocab_size=len(theirs) + spare, image_token_id=context)
    model.save_pretrained(tmp_path)
    recipe = brought_in(tmp_path, to=tmp_path / "ours")
    chat = ChatFormat(open_tokenizer(recipe), recipe.text)
    image = chat.media(image_token_length=ROWS).image((3, 1))
    wanted = ["<img>", *["<IMG_CONTEXT>"] * ROWS * 4, "</img>"]
    assert theirs.convert_ids_to_tokens(image.ids) == wanted


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


@pytest.mark.parametrize("parts", ["alone", "with a tower"])
def test_code_of_a_folder_is_neither_run_nor_offered_to_run(
    parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """transformers asks on the terminal, and runs the code on a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    llm = save(model_of("qwen2"), tmp_path / "llm")
    change(llm, auto_map={"AutoConfig": "configuration_own.OwnConfig"}, model_type="qwen2")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: pass\n"
    (llm / "configuration_own.py").write_text(code)
    tower = [] if parts == "alone" else [save_vision(tmp_path / "vit")]
    import_weights([llm, *tower], tmp_path / "ours", projector="internvl")
    assert not (tmp_path / "ran").exists()
    assert "custom code" not in capsys.readouterr().out


def with_text(checkpoint: Path, **fields: object) -> None:
    """Replace fields of the recipe's `text` in a checkpoint."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["recipe"]["text"] |= fields
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("template", ["jinja", "chatml"])
def test_a_default_system_turn_leaves_with_the_template(template: str, tmp_path: Path) -> None:
    brought_in(save(model_of("qwen2"), tmp_path / "llm"), to=tmp_path / "ours")
    with_text(tmp_path / "ours", system='"a"\nb', template=template)
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    asked = [{"role": "user", "content": "a"}]
    begun = theirs.apply_chat_template(asked, tokenize=False)
    assert begun.startswith('<|im_start|>system\n"a"\nb<|im_end|>\n<|im_start|>user\na')
    own = [{"role": "system", "content": "b"}, *asked]
    begun = theirs.apply_chat_template(own, tokenize=False)
    assert begun.startswith("<|im_start|>system\nb<|im_end|>\n<|im_start|>user\na")


def test_a_default_system_turn_leaves_with_either_layout_of_internvl(tmp_path: Path) -> None:
    chat = save_chat(model_of("internvl-hf"), tmp_path / "chat")
    brought_in(chat, to=tmp_path / "ours")
    asked = [{"role": "user", "content": "a"}]
    for system in (INTERNVL_SYSTEMS["internvl2_5"], "ab"):
        with_text(tmp_path / "ours", system=system)
        hf = tmp_path / f"hf-{len(system)}"
        export_checkpoint(tmp_path / "ours", hf, folder_format="internvl-hf")
        theirs = AutoTokenizer.from_pretrained(hf)
        begun = theirs.apply_chat_template(asked, tokenize=False)
        assert begun.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na")
        back = tmp_path / f"chat-{len(system)}"
        export_checkpoint(tmp_path / "ours", back, folder_format="internvl-chat")
        assert brought_in(back, to=tmp_path / f"again-{len(system)}").text.system == system


@pytest.mark.parametrize("since", ["changed", "gone"])
def test_an_export_has_the_tokenizer_that_the_checkpoint_was_trained_with(
    since: str, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    brought_in(save(model_of("qwen2"), tmp_path / "llm"), to=ours)
    origin = ours / "hugging_face" / "causal"
    trained = tmp_path / "run"
    shutil.copytree(ours, trained, ignore=shutil.ignore_patterns("hugging_face"))
    with_text(trained, tokenizer=str(origin))
    copy_tokenizer(origin, trained)
    before = AutoTokenizer.from_pretrained(origin)
    if since == "gone":
        shutil.rmtree(ours)
    else:
        (origin / "chat_template.jinja").write_text("{{ 'changed' }}")
        (origin / "vocab.json").write_text("{}")
    export_checkpoint(trained, tmp_path / "back")
    after = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template
    assert not (tmp_path / "back" / "vocab.json").exists()
