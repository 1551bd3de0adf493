"""RoPE scaling: rotary embeddings for contexts longer than in pre-training."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.parsing.fields import check_fields, described, require


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """Scaling of rotary frequencies; fields that `kind` does not use are ignored."""

    kind: Literal["none", "linear", "llama3", "yarn"] = described(
        "none",
        "none, linear (position interpolation), llama3 (Llama 3.1) or yarn (arXiv 2309.00071).",
    )
    factor: float = described(1.0, "Ratio of the new context length to the original one.", ge=1)
    original_length: int = described(0, "llama3, yarn: original context length in tokens.", ge=0)
    low_freq_factor: float = described(
        1.0, "llama3: wavelengths above original_length / low_freq_factor are scaled in full.", gt=0
    )
    high_freq_factor: float = described(
        4.0, "llama3: wavelengths below original_length / high_freq_factor are not scaled.", gt=0
    )
    beta_fast: float = described(
        32.0,
        "yarn: dimensions with more rotations than this in original_length are not scaled.",
        gt=0,
    )
    beta_slow: float = described(
        1.0, "yarn: dimensions with fewer rotations than this are scaled in full.", gt=0
    )
    truncate: bool = described(True, "yarn: round the bounds of the ramp to whole dimensions.")
    attention_scale: float = described(
        0.0, "yarn: scale of queries and keys; 0: 0.1 ln(factor) + 1.", ge=0
    )

    def __post_init__(self) -> None:
        check_fields(self, "model.language.rope_scaling.")
        require(
            self.kind not in ("llama3", "yarn") or self.original_length > 0,
            f"model.language.rope_scaling.original_length is {self.original_length}: {self.kind} "
            "needs the length that the model was trained at",
        )
        require(
            self.kind != "llama3" or self.low_freq_factor < self.high_freq_factor,
            f"model.language.rope_scaling.low_freq_factor is {self.low_freq_factor}: it must be "
            f"below high_freq_factor {self.high_freq_factor}",
        )

    @property
    def attention_factor(self) -> float:
        """Scale of rotated queries and keys (mscale of YaRN)."""
        if self.kind != "yarn":
            return 1.0
        # The temperature that the paper of YaRN recommends for Llama models.
        return self.attention_scale or 0.1 * math.log(self.factor) + 1.0
