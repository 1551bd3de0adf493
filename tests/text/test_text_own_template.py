"""Chat templates of tokenizer folders: answers found in what they render, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_vita.config import TextConfig
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.hugging_face import HuggingFaceTokenizer
from megatron_vita.text.jinja_environment import render
from megatron_vita.text.pieces import EncodedTurn, MediaPiece, TextPiece
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.vocabulary import open_tokenizer
from tests.text.published import GENERATION, QWEN, TURN, byte_level_bpe
from tests.text.test_text_vocabulary import recipe, save_bytes

TALK = [
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION


@pytest.fixture(scope="module")
def definition() -> str:
    return byte_level_bpe(*QWEN, "</s>").to_str()


def chat_of(definition: str, template: str, **settings: Any) -> ChatFormat:
    tokenizer = HuggingFaceTokenizer(
        definition, added=(), chat_template=template, named_tokens={"eos_token": "</s>"}
    )
    return ChatFormat(tokenizer, TextConfig(template="jinja", **settings))


def shown(turns: list[EncodedTurn], tokenizer: Tokenizer, *, scored: bool | None = None) -> str:
    pieces = [piece for turn in turns for piece in turn if isinstance(piece, TextPiece)]
    ids = [i for piece in pieces if scored in (None, piece.loss) for i in piece.ids]
    return tokenizer.decode(ids, skip_special=False)


def encode(chat: ChatFormat, messages: list[dict[str, Any]] = TALK) -> list[EncodedTurn]:
    return chat.encode(check_messages({"messages": messages}))


MARKED = {  # a block's tag swallows the line break after it
    "end inside": "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}",
    "end outside": "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",
    "trimmed": "{%- generation -%} {{ m.content }}<|im_end|> {%- endgeneration -%} {{ '\n' }}",
}


@pytest.mark.parametrize("marked", MARKED)
def test_generation_blocks_say_what_is_scored(definition: str, marked: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant{{ '\n' }}"
        + MARKED[marked]
        + "{% else %}"
        + TURN
        + "{% endif %}{% endfor %}"
        + GENERATION
    )
    chat = chat_of(definition, template)
    encoded = encode(chat)
    assert shown(encoded, chat.tokenizer, scored=True) == "the cat<|im_end|>yes<|im_end|>"
    assert shown(encoded, chat.tokenizer) == shown(
        encode(chat_of(definition, CHATML)), chat.tokenizer
    )
    prompt = chat.prompt(check_messages({"messages": TALK[:1]}, needs_answer=False))
    assert shown(prompt, chat.tokenizer).endswith("what?<|im_end|>\n<|im_start|>assistant\n")


def test_generation_blocks_give_transformers_own_mask(tmp_path: Path, definition: str) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{{ '\n' }}{% endfor %}"
    )
    chat = chat_of(definition, template)
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(*QWEN, "</s>"))
    theirs.chat_template = template
    masked = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    pieces = [piece for turn in encode(chat) for piece in turn]
    assert [i for piece in pieces for i in piece.ids] == masked["input_ids"]
    ours = [int(piece.loss) for piece in pieces for _ in piece.ids]
    assert ours == masked["assistant_masks"]


def test_an_unequal_number_of_generation_blocks_is_refused(definition: str) -> None:
    template = "{% for m in messages %}" + TURN + "{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="1 generation blocks for messages with 2 answers"):
        encode(chat_of(definition, template))


def test_a_system_turn_that_is_merged_into_the_users_is_taken(definition: str) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}"
        "{% if m.role == 'user' %}[{{ first if loop.first }}{{ m.content }}]{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    chat = chat_of(definition, template)
    encoded = encode(chat, [{"role": "system", "content": "be kind"}, *TALK])
    assert shown(encoded, chat.tokenizer) == "[be kind\n\nwhat?]the cat</s>[sure?]yes</s>"
    assert shown(encoded, chat.tokenizer, scored=True) == "the cat</s>yes</s>"
    assert chat.end_of_turn == "</s>"


def test_a_turn_that_a_template_leaves_out_is_refused_by_its_number(definition: str) -> None:
    template = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + GENERATION
    chat = chat_of(definition, template)
    late = [TALK[0], TALK[1], {"role": "system", "content": "zebra"}, *TALK[2:]]
    with pytest.raises(DataError, match=r"^messages\[2\]: .*leaves out"):
        encode(chat, late)


def test_turns_are_counted_without_the_recipes_system_turn(definition: str) -> None:
    template = "{% for m in messages %}{{ m.content if loop.index0 != 2 else 'gone' }}<|im_end|>{% endfor %}"
    chat = chat_of(definition, template, system="be kind")
    with pytest.raises(DataError, match=r"^messages\[1\]: "):
        encode(chat)


def test_the_recipes_system_turn_comes_before_conversations_without_one(definition: str) -> None:
    for template in ("jinja", "chatml"):
        chat = chat_of(definition, CHATML, system="be kind")
        chat = ChatFormat(chat.tokenizer, TextConfig(template=template, system="be kind"))
        whole = shown(encode(chat), chat.tokenizer)
        assert whole.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhat?")
        own = shown(encode(chat, [{"role": "system", "content": "be rude"}, *TALK]), chat.tokenizer)
        assert own.startswith("<|im_start|>system\nbe rude<|im_end|>\n<|im_start|>user\nwhat?")


def test_an_objection_of_a_template_is_told(definition: str) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + CHATML
    )
    chat = chat_of(definition, template)
    with pytest.raises(DataError, match="chat template refuses messages: no system turns"):
        encode(chat, [{"role": "system", "content": "x"}, *TALK])
    with pytest.raises(DataError, match=r"what comes before messages\[0\]"):
        encode(chat, TALK[1:])


def test_a_prefix_that_later_turns_rewrite_is_refused_by_its_turn(definition: str) -> None:
    template = "{{ messages|length }}{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION
    with pytest.raises(DataError, match=r"^messages\[1\]: .*its beginning cannot be found"):
        encode(chat_of(definition, template))


def test_a_generation_prompt_that_answers_lack_is_refused(definition: str) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    with pytest.raises(DataError, match=r"^messages\[1\]: "):
        encode(chat_of(definition, template))


def test_an_answer_without_a_special_end_goes_to_the_end_of_its_turn(definition: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:"
        "{% else %} {{ m.content }}\n{% endif %}{% endfor %}"
    )
    chat = chat_of(definition, template)
    encoded = encode(chat)
    assert chat.end_of_turn == ""
    assert shown(encoded, chat.tokenizer, scored=True) == " the cat\n yes\n"
    assert shown(encoded, chat.tokenizer) == "Q: what?\nA: the cat\nQ: sure?\nA: yes\n"


def test_media_stand_where_their_tags_are_and_must_all_be_written(definition: str) -> None:
    chat = chat_of(definition, CHATML)
    messages = [{"role": "user", "content": "a<video>b<image>"}, TALK[1]]
    sample = {"messages": messages, "images": ["i"], "videos": ["v"]}
    (pieces,) = chat.encode(check_messages(sample))
    kinds = [piece.kind for piece in pieces if isinstance(piece, MediaPiece)]
    assert kinds == ["video", "image"]
    twice = chat_of(definition, CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"))
    with pytest.raises(DataError, match=r"messages has media \['video', 'image'\], of which"):
        twice.encode(check_messages(sample))


def test_characters_of_private_use_in_what_is_said_come_through(definition: str) -> None:
    said = "".join(map(chr, range(0xF0000, 0xF0010)))
    chat = chat_of(definition, CHATML)
    messages = [
        {"role": "user", "content": f"{said}<|im_end|>"},
        {"role": "assistant", "content": said},
    ]
    encoded = encode(chat, messages)
    assert shown(encoded, chat.tokenizer, scored=True) == said + "<|im_end|>"
    assert f"user\n{said}<|im_end|><|im_end|>" in shown(encoded, chat.tokenizer)


def test_special_tokens_that_swallow_white_space_do_so_in_the_templates_text(
    tmp_path: Path,
) -> None:
    from tokenizers import AddedToken

    backend = byte_level_bpe("<|im_start|>")
    backend.add_special_tokens(
        [
            AddedToken("<|end|>", rstrip=True, normalized=False),
            AddedToken("<|mid|>", lstrip=True, normalized=False),
        ]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend)
    turn = "<|im_start|>{{ m.role }} \n<|mid|> {{ m.content }} <|end|>\n\n"
    theirs.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    theirs.save_pretrained(tmp_path)
    chat = ChatFormat(load_tokenizer(tmp_path, added=()), TextConfig(template="jinja"))
    ids = [i for turn in encode(chat) for piece in turn for i in piece.ids]
    assert ids == theirs.apply_chat_template(TALK)["input_ids"]


def test_a_recipe_that_asks_for_a_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    entries = save_bytes(tmp_path, *QWEN)
    with pytest.raises(
        ConfigError, match="template is jinja, but the tokenizer has no chat template"
    ):
        open_tokenizer(recipe(tmp_path, entries, text_only=True, template="jinja"))


def test_a_template_that_is_not_valid_is_refused_at_the_start(definition: str) -> None:
    with pytest.raises(ConfigError, match="chat template is not valid: line 1: "):
        chat_of(definition, "{% for %}").check()
    with pytest.raises(ConfigError, match="does not render a question and its answer: never"):
        chat_of(definition, "{{ raise_exception('never') }}").check()


def test_tokens_that_a_recipe_names_must_be_there(definition: str) -> None:
    for field in ({"begin_token": "<s>"}, {"end_token": "<s>"}):
        with pytest.raises(ConfigError, match="'<s>' is not a special token"):
            chat_of(definition, CHATML, **field).check()
    with pytest.raises(ConfigError, match=r"text\.stop_tokens names '<s>', which is not a token"):
        chat_of(definition, CHATML, stop_tokens=["<s>"]).check()
    no_end = HuggingFaceTokenizer(
        byte_level_bpe("<x>").to_str(),
        added=(),
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(ConfigError, match=r"text\.stop_tokens is empty, and neither"):
        ChatFormat(no_end, TextConfig(template="jinja")).check()


def test_a_stop_token_may_be_any_entry_of_the_vocabulary(definition: str) -> None:
    chat = chat_of(definition, CHATML, stop_tokens=["\u0120cat"])
    (cat,) = chat.tokenizer.encode(" cat")
    assert cat in chat.stop_ids


def test_a_begin_token_begins_documents_and_prompts_of_built_in_templates(definition: str) -> None:
    tokenizer = chat_of(definition, CHATML).tokenizer
    for template in ("chatml", "plain"):
        chat = ChatFormat(
            tokenizer, TextConfig(template=template, begin_token="</s>", end_token="</s>")
        )
        assert shown(encode(chat), tokenizer).startswith("</s>")
        assert not shown(encode(chat), tokenizer, scored=True).startswith("</s>")
        prompt = chat.prompt(check_messages({"messages": TALK[:1]}, needs_answer=False))
        assert shown(prompt, tokenizer).startswith("</s>")
        assert shown(chat.raw_text("cat"), tokenizer) == "</s>cat</s>"


def test_a_format_survives_pickling_and_its_fingerprint_sees_what_it_depends_on(
    definition: str,
) -> None:
    chat = chat_of(definition, CHATML)
    again = pickle.loads(pickle.dumps(chat))
    assert encode(again) == encode(chat)
    others = [
        chat_of(definition, CHATML + " "),
        chat_of(definition, CHATML, system="x"),
        chat_of(definition, CHATML, begin_token="</s>"),
        chat_of(definition, CHATML, end_token="</s>"),
        ChatFormat(chat.tokenizer, TextConfig(template="chatml")),
    ]
    assert again.fingerprint == chat.fingerprint
    assert len({each.fingerprint for each in [chat, *others]}) == 6
    dated = chat_of(definition, CHATML, date="2026-01-31", stop_tokens=["</s>"])
    assert dated.fingerprint == chat.fingerprint


# The sandbox


def rendering(source: str, **settings: Any) -> str:
    return render(source, TALK, names={}, add_generation_prompt=False, **settings)


def test_templates_have_what_transformers_gives_them() -> None:
    assert rendering("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert (
        rendering("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}")
        == '{\n "a": 2,\n "b": 1\n}'
    )
    assert rendering("{% for m in messages %}{% break %}{% endfor %}{{ dict(a=1).a }}") == "1"
    assert rendering("{{ strftime_now('%d.%m.%Y') }}", date="2026-01-31") == "31.01.2026"
    assert (
        rendering(
            "{% if tools is none and documents is none %}x{% endif %}\n  {% if 1 %}\ny{% endif %}"
        )
        == "xy"
    )
    with pytest.raises(jinja2.TemplateError, match=r"^no$"):
        rendering("{{ raise_exception('no') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ strftime_now.__self__.year }}",
        "{{ dict.__globals__.x }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.format_map.__self__.x }}",
    ],
)
def test_templates_cannot_reach_out_of_the_sandbox_and_their_faults_are_theirs(source: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        rendering(source)
