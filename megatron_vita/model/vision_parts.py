"""Parts of a vision layer that can be tensor-parallel: attention by heads, the MLP by width.

Where heads do not divide, heads of zeros are added, which stay zero: their output is zero, so no
gradient reaches them. Collectives are megatron-core's; without a group there are none.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_vita.config import VisionConfig
from megatron_vita.rounding import ceil_div

_AXES = {
    "attention.qkv.weight": 1,
    "attention.qkv.bias": 1,
    "attention.q_norm.weight": 0,
    "attention.k_norm.weight": 0,
    "attention.projection.weight": 1,
    "mlp.fc1.weight": 0,
    "mlp.fc1.bias": 0,
    "mlp.fc2.weight": 1,
}


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU as OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class TowerSplit:
    """Tensor parallelism of the tower over a group; None: not split."""

    padded = tuple(name for name in _AXES if name.startswith("attention."))

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.ranks = 1
        self.rank = 0
        if group is not None:
            self.ranks = group.size()
            self.rank = group.rank()

    def axis_of(self, name: str) -> int | None:
        """Return the axis along which parameter `name` is split; None if each rank holds all of
        it."""
        if self.group is None:
            return None
        return next((axis for ending, axis in _AXES.items() if name.endswith(ending)), None)

    def shard_of(self, whole: Tensor, *, name: str, size: torch.Size) -> Tensor:
        """Return this rank's shard of a parameter, with zeros where it extends beyond the whole
        one."""
        axis = self.axis_of(name)
        if axis is None:
            return whole
        start = self.rank * size[axis]
        length = size[axis]
        stop = min(start + length, whole.shape[axis])
        part = whole.new_zeros(size)
        if start < stop:
            part.narrow(axis, 0, stop - start).copy_(whole.narrow(axis, start, stop - start))
        return part

    def copy_to_ranks(self, x: Tensor) -> Tensor:
        """Mark `x`, the same on all ranks, as input of split work: its gradients are summed over
        ranks."""
        if self.group is None:
            return x
        return copy_to_tensor_model_parallel_region(x, group=self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, on each of them; all receive the same gradient."""
        if self.group is None:
            return x
        return reduce_from_tensor_model_parallel_region(x, group=self.group)


def build_norm(config: VisionConfig) -> nn.Module:
    """Build a norm over the tower's width."""
    norm = nn.LayerNorm if config.normalization == "LayerNorm" else nn.RMSNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


class HeadsNorm(nn.Module):
    """RMSNorm over all heads together, split over ranks (InternViT-6B's norm of queries and
    keys)."""

    def __init__(self, config: VisionConfig, split: TowerSplit, width: int) -> None:
        super().__init__()
        self.total = config.hidden_size
        self.eps = config.layernorm_epsilon
        self.split = split
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: [..., width] -> [..., width]."""
        squares = x.float().square().sum(-1, keepdim=True)
        # Each rank's heads contribute to the gradient of the mean, so that it is summed over ranks
        # on the way back as well.
        mean = self.split.copy_to_ranks(self.split.reduce(squares)) / self.total
        return (x.float() * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight


class QueryKeyValue(nn.Module):
    """The three input projections of attention as one weight [3, width, H]."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, width, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(3, width)) if config.add_qkv_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Project [n, s, H] -> [n, s, 3 * width]."""
        bias = None
        if self.bias is not None:
            bias = self.bias.flatten()
        return F.linear(x, self.weight.flatten(0, 1), bias)


class VisionAttention(nn.Module):
    """Bidirectional attention over the patches of one tile."""

    def __init__(self, config: VisionConfig, split: TowerSplit) -> None:
        super().__init__()
        self.split = split
        self.heads = ceil_div(config.num_attention_heads, split.ranks)
        self.head_width = config.hidden_size // config.num_attention_heads
        width = self.heads * self.head_width
        self.qkv = QueryKeyValue(config, width)
        self.q_norm = HeadsNorm(config, split, width) if config.qk_layernorm else None
        self.k_norm = HeadsNorm(config, split, width) if config.qk_layernorm else None
        self.projection = RowLinear(width, config.hidden_size, split)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [n, s, H] -> [n, s, H]."""
        n, s, _ = x.shape
        q, k, v = self.qkv(self.split.copy_to_ranks(x)).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q, k, v = (y.view(n, s, self.heads, self.head_width).transpose(1, 2) for y in (q, k, v))
        if n:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            # On CUDA torch returns None for no tiles. The sum keeps every parameter in the graph,
            # so that each gets its gradient, of zeros, which megatron-core waits for.
            attended = q + k + v
        return self.projection(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """MLP with one hidden layer, split by width."""

    def __init__(self, config: VisionConfig, split: TowerSplit) -> None:
        super().__init__()
        self.split = split
        width = config.ffn_hidden_size // split.ranks
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = RowLinear(width, config.hidden_size, split)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP: [n, s, H] -> [n, s, H]."""
        return self.fc2(self.activation(self.fc1(self.split.copy_to_ranks(x))))


class RowLinear(nn.Module):
    """Row-parallel linear layer, whose input is split over the ranks; its bias is added once."""

    def __init__(self, width: int, hidden_size: int, split: TowerSplit) -> None:
        super().__init__()
        self.split = split
        self.weight = nn.Parameter(torch.empty(hidden_size, width))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Project [n, s, width] -> [n, s, H]."""
        if self.split.group is None:
            return F.linear(x, self.weight, self.bias)
        # The bias after the sum, which would otherwise add it once for each rank.
        return self.split.reduce(F.linear(x, self.weight)) + self.bias
