"""Balance of pipeline stages, whose ends also run the vision tower and the output layer."""

from megatron_vita.config import Recipe
from megatron_vita.costs.flops import attention_flops, linear_flops, output_flops, tile_flops
from megatron_vita.costs.memory import PackLoad


def stage_flops(recipe: Recipe, load: PackLoad, *, lengths: list[int]) -> list[int]:
    """Count each pipeline stage's FLOPs for a pack like `load` with documents of `lengths` tokens.

    Forward and backward; a frozen tower has no backward.
    """
    counts = recipe.parallel.layers_of_stages(recipe.model.language.num_layers)
    return _loads(recipe, load, lengths=lengths, counts=counts)


def _loads(recipe: Recipe, load: PackLoad, *, lengths: list[int], counts: list[int]) -> list[int]:
    language = recipe.model.language
    segments = lengths if recipe.data.isolate_documents else [recipe.data.seq_length]
    all_layers = linear_flops(language, recipe.data.seq_length) + attention_flops(
        language, segments
    )
    loads = [3 * all_layers * count // language.num_layers for count in counts]
    if not recipe.model.text_only:
        loads[0] += (
            load.tiles
            * tile_flops(recipe.model)
            * (1 if recipe.training.freeze_vision_model else 3)
        )
    loads[-1] += 3 * output_flops(language, load.rows)
    return loads


def even_ends(recipe: Recipe, load: PackLoad, *, lengths: list[int]) -> tuple[int, int]:
    """Return the layers of first and last stage that make the slowest stage fastest.

    The current numbers if none are better. There must be at least 2 stages.
    """
    total = recipe.model.language.num_layers
    stages = recipe.parallel.pipeline_model_parallel_size
    now = recipe.parallel.layers_of_stages(total)
    best = max(_loads(recipe, load, lengths=lengths, counts=now))
    ends = (now[0], now[-1])
    for first in range(1, total):
        for last in range(1, total - first + 1):
            between = total - first - last
            if (between % (stages - 2) if stages > 2 else between) or (
                stages > 2 and between < stages - 2
            ):
                continue
            counts = [
                first,
                *([between // (stages - 2)] * (stages - 2) if stages > 2 else []),
                last,
            ]
            slowest = max(_loads(recipe, load, lengths=lengths, counts=counts))
            if slowest < best:
                best = slowest
                ends = (first, last)
    return ends
