"""Rotary frequencies, with the scalings that extend a model beyond its trained length."""

import math

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vita.config import LanguageConfig, RopeScalingConfig


def inverse_frequencies(shape: LanguageConfig) -> Tensor:
    """Compute radians per token for each pair of dimensions [kv_channels / 2], fp32, on the
    host."""
    # On the host by name: models are also built under `torch.device("meta")`.
    even = torch.arange(0, shape.kv_channels, 2, dtype=torch.float32, device="cpu")
    exponents = even / shape.kv_channels
    plain = 1.0 / shape.rotary_base**exponents
    scaling = shape.rope_scaling
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    # Fast dimensions turn many times within the trained length and stay as they are; slow ones,
    # which never complete a turn there, are interpolated.
    if scaling.kind == "llama3":
        unscaled = _llama3_share(plain, scaling)
    else:
        unscaled = _yarn_share(shape)
    return plain * unscaled + plain / scaling.factor * (1 - unscaled)


def _llama3_share(plain: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Compute the unscaled fraction of each frequency from its turns in the original length.

    Source: Llama 3.1's reference code.
    """
    turns = scaling.original_length * plain / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return ramp.clamp(0, 1)


def _yarn_share(shape: LanguageConfig) -> Tensor:
    """Compute the unscaled fraction of each frequency as a ramp over dimensions.

    Source: YaRN, section 3.2, NTK by parts.
    """
    scaling = shape.rope_scaling
    width = shape.kv_channels

    def dimension_of(turns: float) -> float:
        length = scaling.original_length / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(shape.rotary_base))

    low = dimension_of(scaling.beta_fast)
    high = dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    # As transformers: bounds that coincide give a step instead of a division by zero.
    ramp = (pairs - low) / max(high - low, 1e-3)
    return 1 - ramp.clamp(0, 1)


def scale_rotary_positions(config: TransformerConfig, factor: float) -> None:
    """Make megatron-core's attention multiply rotated queries and keys by `factor`.

    It reads YaRN's fields from a config that has them, and computes (0.1 * yarn_mscale *
    ln(scaling) + 1) from them: with a scaling of e, yarn_mscale is 10 * (factor - 1).
    """
    if factor != 1.0:
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale = 10 * (factor - 1)
        config.yarn_mscale_all_dim = 0.0
