"""Formats of Hugging Face folders: the parts of the model that they hold, and their config fields
and tensor names."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vita.config import ModelConfig, ProjectorConfig
from megatron_vita.convert.families import idle_fields
from megatron_vita.convert.families import vision_tables as names
from megatron_vita.convert.families.config_file import QUANTIZED, UNQUANTIZED, Config
from megatron_vita.convert.families.language_config import FAMILIES, read_language, write_language
from megatron_vita.convert.families.language_tables import language_table
from megatron_vita.convert.families.mapping import Rule, expand
from megatron_vita.convert.families.vision_config import (
    read_clip,
    read_eva,
    read_internvit,
    read_siglip,
    write_clip,
    write_eva,
    write_internvit,
)
from megatron_vita.errors import CheckpointError
from megatron_vita.registry import Registry

Fields = dict[str, Any]
PREFIXED = "-prefixed"  # names of formats whose names of tensors begin with `vision_model.`


@dataclass(frozen=True, kw_only=True)
class FolderFormat:
    """One kind of Hugging Face folder. Parts have the names of the model's modules."""

    name: str
    parts: tuple[str, ...]
    read: Callable[[Config, Collection[str]], ModelConfig]  # from a config and the names of tensors
    # a config from shapes; the second is what it may start from
    write: Callable[[ModelConfig, Fields], Fields]
    table: Callable[[ModelConfig], list[Rule]]
    model_types: tuple[str, ...] = ()  # in config.json; a language family's are its own name
    projector: str = "internvl"  # the kind, where it has one
    # beginnings of names that the model has no use for, and that travel along
    passthrough: tuple[str, ...] = ()
    # beginnings of names that belong to models around this part, and are left behind
    ignored: tuple[str, ...] = ()


def _tied(config: Config, tensors: Collection[str], head: str, *, default: bool = False) -> bool:
    """Tell whether the output layer shares the word embedding.

    A head among the tensors is used whatever the config says, as in transformers. `default` holds
    where neither the config nor a nested config says anything.
    """
    # Versions of transformers write the flag at the top, in the nested config, or in both.
    parts = [config.get(name) or {} for name in ("text_config", "llm_config")]
    flags = [fields.get("tie_word_embeddings") for fields in (config.values, *parts)]
    config.flag("tie_word_embeddings", default)
    said = [flag for flag in flags if flag is not None]
    if f"{head}weight" in tensors:
        return False
    if said:
        return any(said)
    return default


def _read_causal(config: Config, tensors: Collection[str]) -> ModelConfig:
    language = read_language(config, tied=_tied(config, tensors, "lm_head."))
    return ModelConfig(text_only=True, language=language)


def _read_chat(config: Config, tensors: Collection[str]) -> ModelConfig:
    config.must_be("downsample_ratio", (0.5,), 0.5)
    # Version 1 of the pixel shuffle leaves the rows and columns of a tile transposed.
    config.must_be("ps_version", ("v2",), "v1")
    # Features of an inner layer would leave the last layers without use.
    config.must_be("select_layer", (-1,), -1)
    for name in ("use_llm_lora", "use_backbone_lora"):
        if config.integer(name, 0, least=0):
            raise config.wrong(name, "merge its low-rank weights into the model's first")
    model = _whole(config, "llm_config", tied=_tied(config, tensors, "language_model.lm_head."))
    config.must_be("hidden_size", (model.language.hidden_size,), model.language.hidden_size)
    config.must_be("force_image_size", (model.vision.image_size,), model.vision.image_size)
    config.disregard(("template", "system_message"))  # read with the chat template
    return model


def _read_hf(config: Config, tensors: Collection[str]) -> ModelConfig:
    config.must_be("downsample_ratio", (0.5,), 0.5)
    config.must_be("projector_hidden_act", ("gelu",), "gelu")
    config.must_be("vision_feature_layer", (-1,), -1)
    config.must_be("vision_feature_select_strategy", ("default",), "default")
    # transformers' InternVLConfig ties the embeddings unless told otherwise.
    tied = _tied(config, tensors, "language_model.lm_head.", default=True)
    model = _whole(config, "text_config", tied=tied)
    rows = model.vision.image_token_length
    config.must_be("image_seq_length", (rows,), rows)
    config.integer("image_token_id", 0, least=0)
    return model


def _whole(config: Config, language: str, *, tied: bool) -> ModelConfig:
    """All parts of an InternVL; `language` is the field with the config of its language model."""
    config.disregard(idle_fields.COMMON)
    config.refuse(QUANTIZED, UNQUANTIZED)
    return ModelConfig(
        vision=read_internvit(config.part("vision_config")),
        projector=ProjectorConfig(kind="internvl"),
        language=read_language(config.part(language), tied=tied),
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
        *language_table(
            model.language, theirs="language_model.model.", head="language_model.lm_head."
        ),
    ]


def _read_long_vita(config: Config, tensors: Collection[str]) -> ModelConfig:
    """Read Long-VITA's config: that of the language model with a field `visual` for the tower.

    Published folders hold a Qwen2; `language_model_type` is a field of our exports.
    """
    language = config.named(config.must_be("language_model_type", tuple(FAMILIES), "qwen2"))
    config.disregard(("media_token_ids",))  # compared with the tokenizer's by the import
    return ModelConfig(
        vision=read_internvit(config.part("visual")),
        projector=ProjectorConfig(kind="long_vita"),
        language=read_language(language, tied=_tied(config, tensors, "lm_head.")),
    )


def _write_long_vita(model: ModelConfig, base: Fields) -> Fields:
    # A published config does not name its language model's type, which is Qwen2.
    is_published = bool(base) and "language_model_type" not in base
    family = "qwen2" if is_published else base.get("language_model_type")
    fields = write_language(model.language, base | {"model_type": family})
    if not is_published:
        fields["language_model_type"] = fields["model_type"]
    return fields | {
        "architectures": base.get("architectures", ["LongVITAForCausalLM"]),
        "model_type": base.get("model_type", "long_vita"),
        "visual": write_internvit(model.vision, base.get("visual", {}), hf=False),
    }


def _long_vita_table(model: ModelConfig) -> list[Rule]:
    projector = names.projector_table(names.PROJECTOR_LONG_VITA, model)
    return [
        *names.vision_table(names.INTERNVIT_CHAT, model.vision, theirs="model.vision_model."),
        *expand(projector, layers=0, theirs="model.vision_projection."),
        *language_table(model.language),
    ]


ALL_PARTS = ("vision_model", "projector", "language_model")
CAUSAL = FolderFormat(
    name="causal",
    parts=("language_model",),
    read=_read_causal,
    write=lambda model, base: write_language(model.language, base),
    table=lambda model: language_table(model.language),
)
INTERNVIT = FolderFormat(
    name="internvit",
    parts=("vision_model",),
    read=lambda config, _: ModelConfig(vision=read_internvit(config)),
    write=lambda model, base: write_internvit(model.vision, base, hf=False),
    table=lambda model: names.vision_table(names.INTERNVIT_CHAT, model.vision),
    model_types=("intern_vit_6b",),
)
INTERNVIT_HF = FolderFormat(
    name="internvit-hf",
    parts=("vision_model",),
    read=lambda config, _: ModelConfig(vision=read_internvit(config)),
    write=lambda model, base: write_internvit(model.vision, base, hf=True),
    table=lambda model: names.vision_table(names.INTERNVIT_HF, model.vision),
    model_types=("internvl_vision",),
)
INTERNVL_CHAT = FolderFormat(
    name="internvl-chat",
    parts=ALL_PARTS,
    read=_read_chat,
    write=_write_chat,
    table=_whole_table(names.INTERNVIT_CHAT, "vision_model.", names.PROJECTOR_CHAT),
    model_types=("internvl_chat",),
)
INTERNVL_HF = FolderFormat(
    name="internvl-hf",
    parts=ALL_PARTS,
    read=_read_hf,
    write=_write_hf,
    table=_whole_table(names.INTERNVIT_HF, "vision_tower.", names.PROJECTOR_HF),
    model_types=("internvl",),
)
LONG_VITA = FolderFormat(
    name="long-vita",
    parts=ALL_PARTS,
    projector="long_vita",
    read=_read_long_vita,
    write=_write_long_vita,
    table=_long_vita_table,
)


def _clip_table(prefix: str) -> Callable[[ModelConfig], list[Rule]]:
    return lambda model: names.vision_table(names.CLIP, model.vision, theirs=prefix)


def _clip_formats(kind: str) -> Iterator[FolderFormat]:
    """Formats of CLIP or SigLIP: tensor names as transformers 5 writes a tower alone, and with the
    prefix that version 4 and whole models have."""
    siglip = kind == "siglip"
    read = read_siglip if siglip else read_clip
    for name, prefix in ((kind, ""), (kind + PREFIXED, "vision_model.")):
        yield FolderFormat(
            name=name,
            parts=("vision_model",),
            read=lambda config, _: ModelConfig(vision=read(config)),
            write=lambda model, base: write_clip(model.vision, base, siglip=siglip),
            table=_clip_table(prefix),
            model_types=() if prefix else (kind, f"{kind}_vision_model"),
            # SigLIP's pooling head and CLIP's last norm come after the features that projectors
            # use.
            passthrough=(f"{prefix}head.",) if siglip else (f"{prefix}post_layernorm.",),
            ignored=(
                "text_model.",
                "text_projection.",
                "visual_projection.",
                "logit_scale",
                "logit_bias",
            ),
        )


EVA = FolderFormat(
    name="eva",
    parts=("vision_model",),
    read=lambda config, _: ModelConfig(vision=read_eva(config)),
    write=lambda model, base: write_eva(model.vision, base),
    table=lambda model: names.vision_table(names.EVA, model.vision, theirs="transformer.vision."),
    model_types=("chatglm",),
    # GLM-4V's language model is not supported. The tower's tensors share this prefix, but are in the
    # mapping and therefore used.
    ignored=("transformer.",),
)
_TOWERS = (*_clip_formats("clip"), *_clip_formats("siglip"), EVA)
_OWN = (CAUSAL, INTERNVIT, INTERNVIT_HF, INTERNVL_CHAT, INTERNVL_HF, LONG_VITA, *_TOWERS)
FOLDER_FORMATS: Registry[FolderFormat] = Registry(
    "folder_format", {each.name: each for each in _OWN}
)


def _by_model_type() -> dict[str, FolderFormat]:
    formats = {kind: each for each in FOLDER_FORMATS.values() for kind in each.model_types}
    return dict.fromkeys(FAMILIES, CAUSAL) | formats


def format_of(config: Config, tensors: Collection[str] = ()) -> FolderFormat:
    """Recognize the format of a folder by its config and tensor names.

    Raises:
        CheckpointError: the model type is unknown.
    """
    if config.get("visual") is not None:  # Long-VITA's own, whatever model type it names
        return LONG_VITA
    known = _by_model_type()
    folder_format = known[config.must_be("model_type", tuple(known), None)]
    prefixed = FOLDER_FORMATS.get(folder_format.name + PREFIXED, folder_format)
    # Only tensor names tell the variants apart. Formats without a variant stay as they are.
    if any(name.startswith("vision_model.") for name in tensors):
        return prefixed
    return folder_format


def format_named(name: str) -> FolderFormat:
    """Look up a format by name; CheckpointError if there is none."""
    if name not in FOLDER_FORMATS:
        raise CheckpointError(f"format is {name!r}; known: {', '.join(FOLDER_FORMATS)}")
    return FOLDER_FORMATS[name]
