"""Initial weights of the language model, the same at every parallel layout.

They depend only on a parameter's name in checkpoints, its layer and a seed. Numbers are drawn in
blocks of rows, each from a generator of its own; a rank draws the blocks that intersect its shard,
so that it never needs more than one block of extra memory. Generators are the device's: weights
drawn on another kind of device differ.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer import TransformerConfig

from megatron_vita.parallel.sharded_state import sharded_tensors

BLOCK = 1 << 24
"""Numbers that are drawn together, in whole rows."""
_OF_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
_OF_RESIDUAL_BRANCHES = ("linear_proj.weight", "linear_fc2.weight")

Draw = Callable[..., Any]


@torch.no_grad()
def set_initial_weights(
    state: dict[str, Any], *, config: TransformerConfig, vocab_size: int, seed: int
) -> None:
    """Initialize the parameters of a rank's sharded `state` of a language model.

    Matrices are normal with the standard deviations of `config`, norms are 1 and biases 0; padding
    rows, beyond `vocab_size`, are 0.
    """
    for tensor in sharded_tensors(state):
        if tensor.key.endswith("bias"):
            tensor.data.zero_()
        elif tensor.data.dim() == 1:
            tensor.data.fill_(1.0)
        else:
            rows = vocab_size if tensor.key.endswith(_OF_VOCABULARY) else None
            _fill_matrix(tensor, draw=_method(tensor.key, config), rows=rows, seed=seed)


def _method(name: str, config: TransformerConfig) -> Draw:
    if name.endswith(_OF_RESIDUAL_BRANCHES):
        return config.output_layer_init_method
    if name.endswith("word_embeddings.weight"):
        return config.embedding_init_method
    return config.init_method


def _fill_matrix(tensor: ShardedTensor, *, draw: Draw, rows: int | None, seed: int) -> None:
    """Fill this rank's shard [r, c] of a matrix, of which the first `rows` (None: all) are
    drawn."""
    layers = tensor.prepend_axis_num
    shard = tensor.data
    # The number of padding rows depends on the layout, so they must not be drawn: they stay zero.
    rows_drawn = rows or tensor.global_shape[layers]
    columns = tensor.global_shape[layers + 1]
    first_row, first_column = tensor.global_offset[layers:]
    name = f"{seed}/{tensor.key}/{tensor.global_offset[:layers]}"
    # Blocks begin at fixed rows of the whole matrix and are drawn whole, whatever part of them this
    # rank holds: so the numbers do not depend on the layout.
    height = max(1, BLOCK // columns)
    shard.zero_()
    last_row = min(first_row + len(shard), rows_drawn)
    for start in range(first_row // height * height, last_row, height):
        stop = min(start + height, rows_drawn)
        block = torch.empty(stop - start, columns, device=shard.device)
        draw(block, generator=generator_of(f"{name}/{start}", shard.device))
        low = max(start, first_row)
        high = min(stop, last_row)
        part = block[low - start : high - start, first_column : first_column + shard.shape[1]]
        shard[low - first_row : high - first_row].copy_(part)


def generator_of(name: str, device: torch.device) -> torch.Generator:
    """Return a generator whose numbers follow from a name alone, on one kind of device."""
    # Not `hash`, which differs from process to process. 63 bits: seeds are signed.
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(number)
