"""Whole fp32 weights in checkpoints of Transformer Engine's Adam with `store_param_remainders`.

With that option the optimizer stores only the lower 16 bits of a weight, as int16; the upper 16 are
the model's bf16 weight, raised by one where the lower half rounds up. megatron-core 0.19.2 writes
those int16 as if they were weights, and cannot load them. Here the whole fp32 weight is written and
split again at loading, so that a run with or without the option can resume from it.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def join_weights(upper: Tensor, lower: Tensor) -> Tensor:
    """Combine bf16 weights and int16 remainders into fp32 weights, bit by bit."""
    # A negative remainder says that the upper half was rounded up: take the one back.
    upper_bits = upper.view(torch.int16).to(torch.int32) - (lower < 0).to(torch.int32)
    lower_bits = lower.to(torch.int32) & 0xFFFF
    return ((upper_bits << 16) | lower_bits).view(torch.float32)


def split_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 weights into bf16 weights (nearest, ties away from zero) and int16 remainders."""
    bits = weights.view(torch.int32)
    # The conversion keeps the lower 16 bits.
    lower = bits.to(torch.int16)
    upper = (bits >> 16) + (lower < 0).to(torch.int32)
    return upper.to(torch.int16).view(torch.bfloat16), lower


def save_remainders_as_fp32() -> None:
    """Patch the distributed optimizer to save and load fp32 weights where it stores remainders."""
    get_states = DistributedOptimizer._get_main_param_and_optimizer_states
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def get_whole(self: Any, model_param: Any) -> dict[str, Tensor]:
        tensors = get_states(self, model_param)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = join_weights(_shard(self, model_param), tensors["param"])
        return tensors

    def set_whole(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if not has_param_remainders(self):
            set_states(self, model_param, tensors)
            return
        # Both halves of the same weight: the model's own may have been rounded otherwise by the run
        # that wrote the checkpoint.
        shard = _shard(self, model_param)
        upper, lower = split_weights(tensors["param"].to(shard.device))
        shard.copy_(upper)
        set_states(self, model_param, {**tensors, "param": lower})

    DistributedOptimizer._get_main_param_and_optimizer_states = get_whole
    DistributedOptimizer._set_main_param_and_optimizer_states = set_whole


def has_param_remainders(optimizer: DistributedOptimizer) -> bool:
    """Tell whether the optimizer stores only the remainders of its fp32 weights."""
    return bool(getattr(optimizer.optimizer, "store_param_remainders", False))


def _shard(optimizer: DistributedOptimizer, model_param: Any) -> Tensor:
    """Return this rank's shard of the model's parameter."""
    group, order = optimizer.model_param_group_index_map[model_param]
    return optimizer.optimizer.param_groups[group]["params"][order].detach()
