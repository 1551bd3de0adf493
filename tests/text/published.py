"""Prompt formats of published models: special tokens, names, default system turn, template.

Values are facts of the published folders; the templates are written anew and render the same
strings. The vocabulary is a small byte-level BPE, so that texts meet merges as they do in the real
ones: letters with the space before them, and line breaks with each other.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "hello world, what is this? the cat sat on the mat.\n\n\n  it is a cat\n\nFrame1: Frame2: ",
    "<|im_end|> user assistant system\n You are a helpful assistant. \n\n",
] * 40
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>"),
)
INTERNVL_MEDIA = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"


def chatml_with_default(system: str) -> str:
    """ChatML that puts a system turn before conversations that have none."""
    default = f"<|im_start|>system\n{system}<|im_end|>\n"
    return (
        "{% if messages[0].role != 'system' %}{{ default }}{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION
    ).replace("{{ default }}", default)


QWEN3_TEMPLATE = (
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n')"
    " if '</think>' in m.content else '' %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ said }}<|im_end|>\n"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + GENERATION
)
LLAMA_TURN = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
LLAMA_GENERATION = (
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    + LLAMA_TURN
    + "{% endfor %}"
) + LLAMA_GENERATION


def llama31(date: str) -> str:
    """Llama 3.1's, which writes a system turn with two dates; 3.2's `date` is today's."""
    return (
        "{{ bos_token }}{% set first = messages[0].role == 'system' %}"
        "<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n"
        "{% if first %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
        "{% for m in messages[1:] if first %}" + LLAMA_TURN + "{% endfor %}"
        "{% for m in messages if not first %}" + LLAMA_TURN + "{% endfor %}" + LLAMA_GENERATION
    )


INTERNVL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% elif part.type == 'video' %}<video>\n"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}" + GENERATION
)
INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
"""System turn of OpenGVLab's own layout for conversations without one (`internvl2_5`)."""


@dataclass(frozen=True)
class Family:
    """A published tokenizer folder, and what prompts made with it begin and end with."""

    special: tuple[str, ...]
    template: str
    begins: str  # of every prompt without a system turn
    end_of_turn: str
    stops: tuple[str, ...]  # that the folder names: eos_token and generation_config's
    names: dict[str, str] = field(default_factory=dict)
    plain: tuple[str, ...] = ()  # added tokens that are not special
    generation_eos: tuple[str, ...] = ()


CHATML_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def _chatml(template: str, begins: str, **fields: Any) -> Family:
    settings: dict[str, Any] = {
        "special": QWEN,
        "names": CHATML_NAMES,
        "generation_eos": CHATML_STOPS,
    } | fields
    return Family(
        template=template, begins=begins, end_of_turn="<|im_end|>", stops=CHATML_STOPS, **settings
    )


def _llama(template: str, begins: str, *, generation_eos: tuple[str, ...]) -> Family:
    return Family(
        special=LLAMA3,
        template=template,
        begins="<|begin_of_text|><|start_header_id|>" + begins,
        end_of_turn="<|eot_id|>",
        stops=generation_eos,
        names={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        generation_eos=generation_eos,
    )


FAMILIES = {
    "qwen2": _chatml(
        chatml_with_default("You are a helpful assistant."),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    ),
    "qwen2.5": _chatml(
        chatml_with_default(QWEN_DEFAULT), f"<|im_start|>system\n{QWEN_DEFAULT}<|im_end|>\n"
    ),
    "qwen3": _chatml(QWEN3_TEMPLATE, "<|im_start|>user\n", plain=("<think>", "</think>")),
    "llama3": _llama(
        LLAMA3_TEMPLATE, "user", generation_eos=("<|end_of_text|>", "<|eot_id|>")
    ),
    "llama3.1": _llama(
        llama31("26 Jul 2024"),
        "system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
        generation_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "llama3.2": _llama(
        llama31("{{ strftime_now('%d %b %Y') }}"),
        "system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 31 Jan 2026\n\n<|eot_id|>",
        generation_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "smollm2": _chatml(
        chatml_with_default(SMOL_DEFAULT),
        f"<|im_start|>system\n{SMOL_DEFAULT}<|im_end|>\n",
        names={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
        generation_eos=("<|im_end|>",),
    ),
    "internvl-hf": _chatml(
        INTERNVL_TEMPLATE, "<|im_start|>user\n", special=(*QWEN, *INTERNVL_MEDIA)
    ),
    "internvl-chat": _chatml(
        chatml_with_default(QWEN_DEFAULT),
        f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>\n",
        special=(*QWEN, *INTERNVL_MEDIA[:3], "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
    ),
}  # fmt: skip


def byte_level_bpe(*special: str, plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits as Qwen's does, with added tokens behind its vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(plain))
    return backend


def save_family(folder: Path, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer folder of a family; gives transformers' reading of it."""
    family = FAMILIES[name]
    if name == "internvl-hf":
        extra = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    else:
        extra = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(*family.special, plain=family.plain),
        **family.names,
        **({"extra_special_tokens": extra} if extra else {}),
    )
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    return tokenizer
