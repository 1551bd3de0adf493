"""Layouts of Hugging Face folders: which parts of the model they hold, and by which names and fields."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import ModelConfig, ProjectorConfig
from megatron_vita.convert import vision_tables as names
from megatron_vita.convert.config_file import Config
from megatron_vita.convert.language_config import FAMILIES, read_language, write_language
from megatron_vita.convert.language_tables import language_table
from megatron_vita.convert.table import Rule
from megatron_vita.convert.vision_config import read_internvit, write_internvit
from megatron_vita.errors import CheckpointError

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One kind of folder. Parts are named as the model names them."""

    name: str
    parts: tuple[str, ...]
    read: Callable[[Config, Collection[str]], ModelConfig]  # from a config and the names of tensors
    write: Callable[[ModelConfig, Fields], Fields]  # a config from shapes; the second is what it may start from
    table: Callable[[ModelConfig], list[Rule]]


def _tied(config: Config, tensors: Collection[str], head: str) -> bool:
    """A head in the file is used, as transformers does, whatever the config says."""
    said = config.get("tie_word_embeddings", False)
    for part in ("text_config", "llm_config"):
        said = said or config.get(part, {}).get("tie_word_embeddings", False)
    return said and f"{head}weight" not in tensors


def _read_causal(config: Config, tensors: Collection[str]) -> ModelConfig:
    language = read_language(config, tied=_tied(config, tensors, "lm_head."))
    return ModelConfig(text_only=True, language=language)


def _read_chat(config: Config, tensors: Collection[str]) -> ModelConfig:
    config.must_be("downsample_ratio", (0.5,), 0.5)
    config.must_be("ps_version", ("v2",), "v1")
    config.must_be("select_layer", (-1,), -1)
    return ModelConfig(
        vision=read_internvit(config.part("vision_config")),
        projector=ProjectorConfig(kind="internvl"),
        language=read_language(config.part("llm_config"), tied=_tied(config, tensors, "language_model.lm_head.")),
    )


def _read_hf(config: Config, tensors: Collection[str]) -> ModelConfig:
    config.must_be("downsample_ratio", (0.5,), 0.5)
    config.must_be("projector_hidden_act", ("gelu",), "gelu")
    config.must_be("vision_feature_layer", (-1,), -1)
    config.must_be("vision_feature_select_strategy", ("default",), "default")
    return ModelConfig(
        vision=read_internvit(config.part("vision_config")),
        projector=ProjectorConfig(kind="internvl"),
        language=read_language(config.part("text_config"), tied=_tied(config, tensors, "language_model.lm_head.")),
    )


def _write_chat(model: ModelConfig, base: Fields) -> Fields:
    return base | {
        "model_type": "internvl_chat",
        "architectures": base.get("architectures", ["InternVLChatModel"]),
        "vision_config": write_internvit(model.vision, base.get("vision_config", {}), hf=False),
        "llm_config": write_language(model.language, base.get("llm_config", {})),
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
    }


def _write_hf(model: ModelConfig, base: Fields) -> Fields:
    return base | {
        "model_type": "internvl",
        "architectures": base.get("architectures", ["InternVLForConditionalGeneration"]),
        "vision_config": write_internvit(model.vision, base.get("vision_config", {}), hf=True),
        "text_config": write_language(model.language, base.get("text_config", {})),
        "image_seq_length": model.vision.image_token_length,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": not model.language.untie_embeddings_and_output_weights,
    }


def _whole_table(
    vision: tuple[Rule, ...], tower: str, projector: tuple[Rule, ...]
) -> Callable[[ModelConfig], list[Rule]]:
    return lambda model: [
        *names.vision_table(vision, model.vision, theirs=tower),
        *names.projector_table(projector, model),
        *language_table(model.language, theirs="language_model.model.", head="language_model.lm_head."),
    ]


ALL_PARTS = ("vision_model", "projector", "language_model")
CAUSAL = Layout(
    name="causal",
    parts=("language_model",),
    read=_read_causal,
    write=lambda model, base: write_language(model.language, base),
    table=lambda model: language_table(model.language),
)
INTERNVIT = Layout(
    name="internvit",
    parts=("vision_model",),
    read=lambda config, _: ModelConfig(vision=read_internvit(config)),
    write=lambda model, base: write_internvit(model.vision, base, hf=False),
    table=lambda model: names.vision_table(names.INTERNVIT_CHAT, model.vision),
)
INTERNVIT_HF = Layout(
    name="internvit-hf",
    parts=("vision_model",),
    read=lambda config, _: ModelConfig(vision=read_internvit(config)),
    write=lambda model, base: write_internvit(model.vision, base, hf=True),
    table=lambda model: names.vision_table(names.INTERNVIT_HF, model.vision),
)
INTERNVL_CHAT = Layout(
    name="internvl-chat",
    parts=ALL_PARTS,
    read=_read_chat,
    write=_write_chat,
    table=_whole_table(names.INTERNVIT_CHAT, "vision_model.", names.PROJECTOR_CHAT),
)
INTERNVL_HF = Layout(
    name="internvl-hf",
    parts=ALL_PARTS,
    read=_read_hf,
    write=_write_hf,
    table=_whole_table(names.INTERNVIT_HF, "vision_tower.", names.PROJECTOR_HF),
)
LAYOUTS = {layout.name: layout for layout in (CAUSAL, INTERNVIT, INTERNVIT_HF, INTERNVL_CHAT, INTERNVL_HF)}
_BY_MODEL_TYPE = dict.fromkeys(FAMILIES, CAUSAL) | {
    "intern_vit_6b": INTERNVIT,
    "internvl_vision": INTERNVIT_HF,
    "internvl_chat": INTERNVL_CHAT,
    "internvl": INTERNVL_HF,
}


def layout_of(config: Config) -> Layout:
    """The layout of a folder with this config; CheckpointError, naming its model type, if there is none."""
    return _BY_MODEL_TYPE[config.must_be("model_type", tuple(_BY_MODEL_TYPE), None)]


def layout_named(name: str) -> Layout:
    """A layout by name."""
    if name not in LAYOUTS:
        raise CheckpointError(f"layout is {name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
