"""fp32 weights as Transformer Engine's Adam keeps them beside bf16 ones, and what a checkpoint holds
of them.

With `store_param_remainders` the optimizer has only the lower 16 bits of a weight, as int16; the
upper 16 are the model's bf16 weight, raised by one where the lower half rounds up. megatron-core
0.19.2 writes those int16 as if they were weights, and cannot load them: here the whole fp32 weight
is written, and split again at loading, so any setting can take it up.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def join_weights(upper: Tensor, lower: Tensor) -> Tensor:
    """fp32 weights from bf16 ones and int16 remainders, bit by bit."""
    upper_bits = upper.view(torch.int16).to(torch.int32) - (lower < 0).to(torch.int32)
    lower_bits = lower.to(torch.int32) & 0xFFFF
    return ((upper_bits << 16) | lower_bits).view(torch.float32)


def split_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weights, rounded to the nearest and halves away from zero, and int16 remainders, from
    fp32 ones."""
    bits = weights.view(torch.int32)
    lower = bits.to(torch.int16)
    upper = (bits >> 16) + (lower < 0).to(torch.int32)
    return upper.to(torch.int16).view(torch.bfloat16), lower


def write_whole_weights() -> None:
    """Has a distributed optimizer give and take whole fp32 weights where it keeps remainders."""
    get_states = DistributedOptimizer._get_main_param_and_optimizer_states
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def get_whole(self: Any, model_param: Any) -> dict[str, Tensor]:
        tensors = get_states(self, model_param)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = join_weights(_shard(self, model_param), tensors["param"])
        return tensors

    def set_whole(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if not keeps_remainders(self):
            set_states(self, model_param, tensors)
            return
        shard = _shard(self, model_param)
        upper, lower = split_weights(tensors["param"].to(shard.device))
        shard.copy_(upper)
        set_states(self, model_param, {**tensors, "param": lower})

    DistributedOptimizer._get_main_param_and_optimizer_states = get_whole
    DistributedOptimizer._set_main_param_and_optimizer_states = set_whole


def keeps_remainders(optimizer: DistributedOptimizer) -> bool:
    """Whether fp32 weights exist only together with the model's."""
    return bool(getattr(optimizer.optimizer, "store_param_remainders", False))


def _shard(optimizer: DistributedOptimizer, model_param: Any) -> Tensor:
    """This rank's part of the model's parameter."""
    group, order = optimizer.model_param_group_index_map[model_param]
    return optimizer.optimizer.param_groups[group]["params"][order].detach()
