"""Activations that each layer keeps for its backward pass, from the fields of `training`."""

import math
from dataclasses import dataclass

from megatron_vita.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Recomputation and offloading of one layer of the language model."""

    recompute: bool = False  # keep the layer's input alone; false: all activations
    keep_attention: bool = False  # with recompute: keep attention's output too
    offload: bool = False  # with recompute: move kept activations to the host
    mlp_rows: int = 0  # rows of a rank that the recomputed MLP takes at a time; 0: all


def layer_memory(recipe: Recipe, num_layers: int) -> list[LayerMemory]:
    """List the memory plan of each layer of a stage, or of one interleaved chunk.

    The first `recompute_num_layers` are recomputed; the last `recompute_keep_attention_layers`
    of those keep attention's output, and the first ones are offloaded.
    """
    training = recipe.training
    recomputed = kept = 0
    if training.recompute_granularity == "full" and training.recompute_method == "block":
        recomputed = min(training.recompute_num_layers or num_layers, num_layers)
        kept = training.recompute_keep_attention_layers
    if kept == -1:
        kept = recomputed
    selective = training.recompute_granularity == "selective"
    # The first layers' activations wait longest for their backward pass: time to copy them.
    offloaded = math.ceil(training.activation_offload_fraction * recomputed)
    plan = []
    for i in range(num_layers):
        rows = 0
        # Only a recomputed MLP can be split: else its activations are kept whole anyway.
        if i < recomputed or selective:
            # A chunk is gathered from all TP ranks: each gives its part of the tokens.
            rows = recipe.rows_of_rank(training.mlp_chunk_tokens)
        plan.append(
            LayerMemory(
                recompute=i < recomputed,
                keep_attention=recomputed - kept <= i < recomputed,
                offload=i < offloaded,
                mlp_rows=rows,
            )
        )
    return plan
