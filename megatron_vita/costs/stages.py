"""Balance of pipeline stages, whose ends also run the vision tower and the output layer."""

from collections.abc import Iterator

from megatron_vita.config import Recipe
from megatron_vita.costs.flops import training_flops
from megatron_vita.costs.memory.memory import PackLoad


def stage_flops(recipe: Recipe, load: PackLoad, *, lengths: list[int]) -> list[int]:
    """Count each pipeline stage's FLOPs for a pack like `load` with documents of `lengths` tokens.

    As `training_flops`, with the padding of the pack.
    """
    counts = recipe.parallel.layers_of_stages(recipe.model.language.num_layers)
    return _loads(recipe, load, lengths=lengths, counts=counts)


def _loads(recipe: Recipe, load: PackLoad, *, lengths: list[int], counts: list[int]) -> list[int]:
    if not recipe.data.isolate_documents:
        # They attend to the whole pack, its padding too.
        lengths = [recipe.data.seq_length]
    parts = training_flops(recipe, lengths, tiles=load.tiles, loss_tokens=load.loss_tokens)
    # Linear maps take the padding too, which attention inside documents does not.
    linear = parts.linear * recipe.data.seq_length // max(sum(lengths), 1)
    all_layers = linear + parts.attention
    loads = [all_layers * count // recipe.model.language.num_layers for count in counts]
    loads[0] += parts.vision
    loads[-1] += parts.output
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
    for counts in _uneven_counts(total, stages):
        slowest = max(_loads(recipe, load, lengths=lengths, counts=counts))
        if slowest < best:
            best = slowest
            ends = (counts[0], counts[-1])
    return ends


def _uneven_counts(total: int, stages: int) -> Iterator[list[int]]:
    """Yield layers of each stage, with any numbers at the ends and equal ones between.

    megatron-core has fields for the first and the last stage, and divides the rest evenly.
    """
    inner = stages - 2
    for first in range(1, total):
        for last in range(1, total - first + 1):
            between = total - first - last
            if inner == 0 and between == 0:
                yield [first, last]
            elif inner > 0 and between >= inner and between % inner == 0:
                yield [first, *[between // inner] * inner, last]
