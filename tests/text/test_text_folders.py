"""Templates and special tokens, wherever a tokenizer's folder keeps them."""

import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from megatron_vita.config import TextConfig
from megatron_vita.errors import ConfigError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.origin import INTERNVL_SYSTEMS, text_of_folder
from megatron_vita.text.tokenizer import load_tokenizer
from tests.text.published import FAMILIES, INTERNVL_SYSTEM, byte_level_bpe, save_family
from tests.text.published_chat import TALK, text_ids


def test_a_chat_template_is_found_wherever_a_folder_keeps_it(tmp_path: Path) -> None:
    theirs = save_family(tmp_path, "qwen2")
    template = (tmp_path / "chat_template.jinja").read_text()
    assert load_tokenizer(tmp_path).chat_template == template == theirs.chat_template
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).chat_template == ""
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for stored in (
        template,
        [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}],
    ):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": stored})
        )
        assert load_tokenizer(tmp_path).chat_template == template
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert load_tokenizer(tmp_path).chat_template == "{{ 1 }}"
    (tmp_path / "chat_template.json").unlink()
    named = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(
        ConfigError, match="templates rag, tool_use, none of which is called default"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folders_facts_are_fields_of_the_recipe(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    theirs = save_family(tmp_path, name)
    ends = [theirs.convert_tokens_to_ids(end) for end in family.generation_eos]
    ends = ends[0] if len(ends) == 1 else ends
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert text_of_folder(tmp_path) == TextConfig(
        template="jinja", stop_tokens=list(family.generation_eos)
    )
    (tmp_path / "generation_config.json").unlink()
    nested = {"text_config": {"eos_token_id": theirs.convert_tokens_to_ids(family.end_of_turn)}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert text_of_folder(tmp_path).stop_tokens == [family.end_of_turn]


def test_a_folder_that_begins_texts_with_a_token_says_so(tmp_path: Path) -> None:
    backend = byte_level_bpe("<|begin_of_text|>", "<|end_of_text|>")
    begin = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    text = text_of_folder(tmp_path)
    assert (text.template, text.begin_token) == ("plain", "<|begin_of_text|>")
    chat = ChatFormat(load_tokenizer(tmp_path, added=()), text)
    chat.check()
    shown = chat.tokenizer.decode(text_ids(chat.raw_text("the cat")), skip_special=False)
    assert shown == "<|begin_of_text|>the cat<|end_of_text|>"
    answered = chat.encode(check_messages({"messages": TALK[2:4]}))
    shown = chat.tokenizer.decode(text_ids(answered), skip_special=False)
    assert shown == "<|begin_of_text|> sure?Yes<|end_of_text|>"


def test_an_end_that_is_no_token_is_refused_by_its_file(tmp_path: Path) -> None:
    save_family(tmp_path, "qwen2")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 99999]}))
    with pytest.raises(
        ConfigError, match=r"generation_config\.json: eos_token_id 99999 is not among"
    ):
        text_of_folder(tmp_path)


def test_opengvlabs_layout_has_its_own_system_turn() -> None:
    assert INTERNVL_SYSTEMS == {"internvl2_5": INTERNVL_SYSTEM}
