"""What each layer keeps between its forward and backward passes, as the fields of `training` say."""

import math
from dataclasses import dataclass

from megatron_vita.config.recipe import Recipe
from megatron_vita.rounding import ceil_div


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Of one layer of the language model."""

    recompute: bool = False  # keeps its input alone; else everything
    keep_attention: bool = False  # of a recomputed layer: attention's output too
    offload: bool = False  # of a recomputed layer: what it keeps waits on the host
    mlp_rows: int = 0  # rows of a rank's share that the MLP takes at once, recomputed; 0: all


def layer_memory(recipe: Recipe, num_layers: int) -> list[LayerMemory]:
    """Of the layers that a rank runs one after another (a stage's, or one interleaved chunk's).

    The first `recompute_num_layers` are recomputed; the last `recompute_keep_attention_layers`
    of those keep attention's output, and the first, which live longest, wait on the host.
    """
    training = recipe.training
    recomputed = kept = 0
    if training.recompute_granularity == "full" and training.recompute_method == "block":
        recomputed = min(training.recompute_num_layers or num_layers, num_layers)
        kept = training.recompute_keep_attention_layers
    if kept == -1:
        kept = recomputed
    selective = training.recompute_granularity == "selective"
    offloaded = math.ceil(training.activation_offload_fraction * recomputed)
    rows = _mlp_rows(recipe)
    return [
        LayerMemory(
            recompute=i < recomputed,
            keep_attention=recomputed - kept <= i < recomputed,
            offload=i < offloaded,
            mlp_rows=rows if i < recomputed or selective else 0,
        )
        for i in range(num_layers)
    ]


def _mlp_rows(recipe: Recipe) -> int:
    """Under sequence parallelism a piece is gathered from the shares of all TP ranks."""
    parallel = recipe.parallel
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return ceil_div(recipe.training.mlp_chunk_tokens, ranks)
