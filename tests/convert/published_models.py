"""Folders of published families with tiny random weights: config, generation config, processor,
special tokens and chat template as published, beside transformers' model of the same weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from megatron_vita.text.tokenizer_base import MEDIA_TOKENS
from tests.convert.published import (
    GENERATION,
    PROCESSOR,
    Fields,
    change,
    tiny,
    tiny_preprocessor,
)
from tests.convert.toy_folders import TOWER, VISION, chat_tensors
from tests.model.hf_weights import randomize
from tests.text.published import (
    CHATML_NAMES,
    FAMILIES,
    INTERNVL_TEMPLATE,
    QWEN,
    byte_level_bpe,
    save_family,
)

ROWS = 4  # placeholders of a tile
SPARE = 8  # rows of a word embedding that Qwen's authors leave free
TEXT = {
    "qwen2": "qwen2-7b", "qwen2.5": "qwen2.5-0.5b", "qwen3": "qwen3-0.6b", "llama3": "llama3-8b",
    "llama3.1": "llama3.1-8b", "llama3.2": "llama3.2-1b", "smollm2": "smollm2-135m",
}  # fmt: skip
"""Published configs by the family whose tokenizer they come with."""
CHAT = ("internvl2.5-1b-chat", "internvl3-1b-chat")
GENERATION_OF = {"llama3": "llama3.1-8b", "llama3.2": "llama3.1-8b"}
TOWERS = {
    "internvit": InternVLVisionConfig(**VISION),
    "clip": CLIPVisionConfig(**TOWER),
    "siglip": SiglipVisionConfig(**TOWER),
}


class Published(NamedTuple):
    """A folder, and its weights and its tokenizer as transformers has them."""

    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerFast


def text_model(folder: Path, family: str) -> Published:
    """A language model."""
    name = TEXT[family]
    tokenizer = save_family(folder, family)
    rows = len(tokenizer) + (SPARE if family.startswith("qwen") else 0)
    fields = described(tiny(name), tokenizer, rows=rows)
    write_fields(folder, fields)
    _save(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), folder, tokenizer)
    write_fields(folder, fields)
    write_generation(folder, GENERATION_OF.get(family, name), family, tokenizer)
    return Published(folder, opened(folder), tokenizer)


def internvl_hf(folder: Path) -> Published:
    """InternVL3 as transformers keeps it."""
    tokenizer = save_family(folder, "internvl-hf")
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    fields = described(
        tiny("internvl3-1b-hf", image_token_id=image), tokenizer, rows=len(tokenizer)
    )
    write_fields(folder, fields)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    _save(model, folder, tokenizer)
    write_fields(folder, fields)
    write_generation(folder, "internvl3-1b-chat", "internvl-hf", tokenizer)
    change(folder, "preprocessor_config.json", **tiny_preprocessor("internvl3-1b-hf"))
    change(folder, "processor_config.json", **(PROCESSOR | {"image_seq_length": ROWS}))
    return Published(folder, opened(folder), tokenizer)


def internvl_chat(folder: Path, name: str) -> Published:
    """InternVL 2.5 or 3 in OpenGVLab's own format. Its class is code of the folder; transformers'
    class for the other format has the same weights."""
    tokenizer = save_family(folder, "internvl-chat")
    fields = described(tiny(name), tokenizer, rows=len(tokenizer))
    model = internvl_of(tokenizer, fields["llm_config"], tower="internvit")
    tensors = {key: tensor.contiguous() for key, tensor in chat_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors")
    write_fields(folder, fields)
    write_generation(folder, "internvl3-1b-chat", "internvl-chat", tokenizer)
    change(folder, "preprocessor_config.json", **tiny_preprocessor(name))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return Published(folder, model, tokenizer)


class LongVitaProjector(nn.Module):
    """Long-VITA's projector in plain PyTorch."""

    def __init__(self, vision: int, language: int) -> None:
        super().__init__()
        self.pre_proj_layernorm = nn.LayerNorm(4 * vision)
        self.mlp = nn.Sequential(
            nn.Linear(4 * vision, vision, bias=False),
            nn.GELU(),
            nn.Linear(vision, language, bias=False),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.pre_proj_layernorm(features))


def long_vita(folder: Path) -> Published:
    """Long-VITA, whose class is code of the folder: transformers' InternVL with another projector."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(*QWEN, *MEDIA_TOKENS), **CHATML_NAMES
    )
    tokenizer.chat_template = FAMILIES["qwen2.5"].template  # which Long-VITA's code does not use
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = INTERNVL_TEMPLATE
    fields = described(tiny("long-vita-16k"), tokenizer, rows=len(tokenizer))
    model = internvl_of(tokenizer, fields, tower="internvit")
    projector = LongVitaProjector(fields["visual"]["hidden_size"], fields["hidden_size"])
    randomize(projector, seed=1)
    model.model.multi_modal_projector = projector
    save_file(long_vita_tensors(model), folder / "model.safetensors")
    write_fields(folder, fields)
    write_generation(folder, "internvl3-1b-chat", "qwen2.5", tokenizer)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return Published(folder, model, tokenizer)


def long_vita_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of Long-VITA's folder, of transformers' InternVL with Long-VITA's projector."""
    tensors = {
        f"model.vision_projection.{name}": tensor
        for name, tensor in model.model.multi_modal_projector.state_dict().items()
    }
    for name, tensor in chat_tensors(model, projector=False).items():
        if name.startswith("vision_model."):
            tensors[f"model.{name}"] = tensor
        elif name.startswith("language_model."):
            tensors[name.removeprefix("language_model.")] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def internvl_of(
    tokenizer: PreTrainedTokenizerFast, language: Fields, *, tower: str
) -> InternVLForConditionalGeneration:
    """transformers' InternVL around a Qwen2 and any tower, with random weights."""
    config = InternVLConfig(
        vision_config=TOWERS[tower],
        text_config=Qwen2Config(**{n: v for n, v in language.items() if n != "model_type"}),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=ROWS,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).float()
    fill(model, entries=len(tokenizer))
    return model.eval()


def tower_beside_language(
    folder: Path, tower: str
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerFast]:
    """A language model in the folder `llm` and a vision tower in the folder `tower`, and both in
    transformers' InternVL, whose projector is random."""
    (folder / "llm").mkdir()
    tokenizer = save_family(folder / "llm", "internvl-hf")
    language = described(tiny("qwen2-7b"), tokenizer, rows=len(tokenizer))
    model = internvl_of(tokenizer, language, tower=tower)
    model.model.vision_tower.save_pretrained(folder / "tower")
    if tower == "internvit":  # whose authors' processor crops images
        processor_fields = tiny_preprocessor("internvit-300m")
        change(folder / "tower", "preprocessor_config.json", **processor_fields)
    causal = Qwen2ForCausalLM(model.config.text_config)
    causal.model.load_state_dict(model.model.language_model.state_dict())
    causal.lm_head.load_state_dict(model.lm_head.state_dict())
    causal.save_pretrained(folder / "llm")
    write_fields(folder / "llm", language)
    return model, tokenizer


def opened(folder: Path) -> nn.Module:
    """transformers' model of a folder in fp32, whatever its config says."""
    has_tower = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    loader = AutoModelForImageTextToText if has_tower else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def described(fields: Fields, tokenizer: PreTrainedTokenizerFast, *, rows: int) -> Fields:
    """A config with the vocabulary and the token ids of a tokenizer."""
    ids = {
        f"{use}_token_id": getattr(tokenizer, f"{use}_token_id") for use in ("bos", "eos", "pad")
    }
    described_fields: Fields = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            described_fields[name] = described(value, tokenizer, rows=rows)
        elif name == "vocab_size":
            described_fields[name] = rows
        else:
            described_fields[name] = value if value is None else ids.get(name, value)
    return described_fields


def fill(model: Any, *, entries: int) -> None:
    """Random weights under which no row beyond the tokenizer's `entries` is likeliest."""
    randomize(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[entries:] = 0


def _save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    fill(model, entries=len(tokenizer))
    model.save_pretrained(folder)


def write_fields(folder: Path, fields: Fields) -> None:
    """Write a config, in place of the one that is there."""
    (folder / "config.json").write_text(json.dumps(fields))


def write_generation(
    folder: Path, name: str, family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The published generation defaults, with the ids that the tokenizer has for its ends."""
    ends = [tokenizer.convert_tokens_to_ids(end) for end in FAMILIES[family].generation_eos]
    fields: dict[str, Any] = dict(GENERATION[name])
    for use in ("bos", "pad"):
        if fields.get(f"{use}_token_id") is not None:
            fields[f"{use}_token_id"] = getattr(tokenizer, f"{use}_token_id")
    (folder / "generation_config.json").write_text(json.dumps(fields | {"eos_token_id": ends}))
