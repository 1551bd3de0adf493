"""Rotary position settings in Hugging Face configs, of transformers 4 and 5, to ours and back."""

import logging
import math
from typing import Any

from megatron_vita.config import RopeScalingConfig
from megatron_vita.convert.families.config_file import Config

Fields = dict[str, Any]
_ROPE_KINDS = {
    "default": "none",
    "none": "none",
    "dynamic": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}
_PLAIN_BASE = 10000.0  # transformers' where a config names none
logger = logging.getLogger(__name__)


def read_rotary(config: Config) -> tuple[float, RopeScalingConfig]:
    """Read base and scaling of rotary positions.

    `dynamic` scaling is read as none: both are equal up to max_position_embeddings.

    Raises:
        CheckpointError: the kind is unknown, or two fields contradict each other; the message names
            the field.
    """
    rope = _chosen(config)
    kind = rope.must_be("rope_type", tuple(_ROPE_KINDS), rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise rope.wrong("type", f"rope_type is {kind!r}: one of them is needed")
    rope.must_be("partial_rotary_factor", (1.0,), 1.0)
    base = _base(config, rope)
    return base, _read_scaling(config, rope, kind)


def _chosen(config: Config) -> Config:
    """Choose between `rope_scaling` (older configs) and `rope_parameters` (newer ones).

    If both are present, transformers takes rope_scaling and drops rope_parameters with its base.
    """
    old = config.get("rope_scaling")
    new = config.get("rope_parameters")
    if not old:
        if new:
            return config.part("rope_parameters")
        return Config({}, config.where)
    scaling = config.part("rope_scaling")
    if new and not _agree(scaling.values, new):
        raise config.wrong(
            "rope_scaling",
            f"but rope_parameters is {new!r}: they contradict each other; leave one of them",
        )
    config.disregard(["rope_parameters"])
    return scaling


def _agree(scaling: Fields, parameters: Any) -> bool:
    """Tell whether taking rope_scaling loses nothing that rope_parameters says."""
    return isinstance(parameters, dict) and all(
        scaling.get(name) == value for name, value in parameters.items()
    )


def _base(config: Config, rope: Config) -> float:
    base = config.number("rope_theta", _PLAIN_BASE, least=1.0)
    return rope.number("rope_theta", base, least=1.0)


def _read_scaling(config: Config, rope: Config, kind: str) -> RopeScalingConfig:
    if _ROPE_KINDS[kind] == "none":
        rope.disregard(["factor", "original_max_position_embeddings"])
        return RopeScalingConfig()
    if kind == "linear":
        rope.disregard(["original_max_position_embeddings"])
        return RopeScalingConfig(kind="linear", factor=rope.number("factor"))
    length = _original_length(config, rope)
    if kind == "llama3":
        return RopeScalingConfig(
            kind="llama3",
            factor=rope.number("factor"),
            original_length=length,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return _read_yarn(config, rope, length)


def warn_of_dynamic(config: Config) -> None:
    """Warn that a model with dynamic scaling differs from transformers beyond its original length."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type")) == "dynamic":
        logger.warning(
            "%s: dynamic rotary scaling is none up to max_position_embeddings %d; beyond it "
            "transformers changes the base, and megatron_vita does not",
            config.where,
            config.integer("max_position_embeddings"),
        )


def _original_length(config: Config, rope: Config) -> int:
    """Original context length; transformers takes max_position_embeddings where it is not given."""
    if config.get("original_max_position_embeddings") is not None:
        return config.integer("original_max_position_embeddings")
    if rope.get("original_max_position_embeddings") is not None:
        return rope.integer("original_max_position_embeddings")
    return config.integer("max_position_embeddings")


def _read_yarn(config: Config, rope: Config, length: int) -> RopeScalingConfig:
    if rope.get("factor") is None:
        factor = config.integer("max_position_embeddings") / length
    else:
        factor = rope.number("factor")
    return RopeScalingConfig(
        kind="yarn",
        factor=factor,
        original_length=length,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.flag("truncate", True),
        attention_scale=_attention_scale(rope, factor),
    )


def _attention_scale(rope: Config, factor: float) -> float:
    """Attention scale of YaRN; 0 where transformers would compute the same from the factor."""
    mscale = rope.number("mscale", 0.0)
    over = rope.number("mscale_all_dim", 0.0)
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if mscale and over:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * over * math.log(factor) + 1)
    return 0.0


def write_rotary(base: float, scaling: RopeScalingConfig, *, origin: Fields) -> Fields:
    """Fields to add to `origin`: none if it says the same, otherwise fields in the style that it
    uses."""
    if "rope_theta" not in origin and "rope_parameters" not in origin:
        return {"rope_parameters": _new_style(base, scaling)}
    if read_rotary(Config(origin, "")) == (base, scaling):
        return {}
    if "rope_theta" in origin:
        return {"rope_theta": base, "rope_scaling": _write_scaling(scaling)}
    return {"rope_parameters": _new_style(base, scaling)}


def _new_style(base: float, scaling: RopeScalingConfig) -> Fields:
    return {"rope_theta": base, **(_write_scaling(scaling) or {"rope_type": "default"})}


def _write_scaling(scaling: RopeScalingConfig) -> Fields | None:
    if scaling.kind == "none":
        return None
    fields: Fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        fields |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_scale:
            fields["attention_factor"] = scaling.attention_scale
    return fields
