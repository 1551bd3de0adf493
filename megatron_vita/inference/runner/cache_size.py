"""Capacity of the key-value cache."""

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.errors import ConfigError
from megatron_vita.inference.runner.kv_cache import CacheShape, KeyValueCache
from megatron_vita.layout.blocks import BlockLayout
from megatron_vita.parallel import groups
from megatron_vita.rounding import ceil_div

_TOKENS_ON_CPU = 65536
_SPARE_BYTES = 3 << 30
"""For the CUDA context's growth, the vision tower, logits and fragmentation."""


def build_cache(
    recipe: Recipe, *, page_tokens: int, tokens: int | None, chunk_tokens: int, fp8: bool
) -> tuple[KeyValueCache, int]:
    """Allocate this rank's cache; returns it and its number of blocks, the same on all ranks.
    Collective.

    `tokens`: capacity over all ranks; None takes what memory leaves.
    """
    layout = groups.rank_layout()
    blocks = BlockLayout(page_tokens=page_tokens, cp_size=layout.cp_size, cp_rank=layout.cp_rank)
    shape = recipe.model.language
    kept = CacheShape(
        layers=shape.num_layers,
        groups=shape.query_groups_of_rank(layout.tp_size),
        width=shape.kv_channels,
        dtype=torch.bfloat16 if recipe.training.bf16 else torch.float32,
        fp8=fp8,
    )
    if tokens is None and platform.on_cuda():
        per_block = kept.bytes_per_token * page_tokens
        # All ranks must allocate the same blocks, since rank 0 decides for all of them.
        count = _agreed((_free_bytes() - _needed_bytes(recipe, chunk_tokens)) // per_block)
    else:
        count = blocks.blocks_for(tokens or _TOKENS_ON_CPU) + 1  # and the scratch block
    if count < 2:
        raise ConfigError(
            f"no memory is left for the key-value cache beside the weights and chunks of {chunk_tokens} tokens: "
            "use smaller chunks (chunk_tokens) or more ranks"
        )
    return KeyValueCache(blocks, kept, blocks=count, device=platform.device()), count


def _free_bytes() -> int:
    # Memory that torch holds in its cache counts as used for the driver.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _needed_bytes(recipe: Recipe, chunk_tokens: int) -> int:
    """Bytes of activations of a prefill chunk: one layer's, and attention's partial results."""
    shape = recipe.model.language
    layout = groups.rank_layout()
    heads = shape.num_attention_heads * shape.kv_channels // layout.tp_size
    per_token = 6 * shape.hidden_size + 4 * shape.ffn_hidden_size // layout.tp_size
    own = ceil_div(chunk_tokens, layout.cp_size) * per_token
    return (own + chunk_tokens * heads * 6) * (2 if recipe.training.bf16 else 4) + _SPARE_BYTES


def _agreed(count: int) -> int:
    """Smallest count of all ranks."""
    least = torch.tensor([count], device=platform.device())
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)
