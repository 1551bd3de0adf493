"""Parameter counts of adapters, whose matrices follow the maps beside them over TP and PP."""

from megatron_vita.config import AdaptedMap, Recipe, adapted_maps
from megatron_vita.config.groups.lora import Part


def whole_adapters(recipe: Recipe) -> int:
    """Count the parameters of all adapters, each once."""
    return sum(_of_map(adapted, recipe, tp=1) for adapted in _adapted(recipe))


def stage_adapters(recipe: Recipe, stage: int) -> int:
    """Count the parameters of adapters on one rank of pipeline stage `stage`."""
    tp = recipe.parallel.tensor_model_parallel_size
    counts = recipe.parallel.layers_of_stages(recipe.model.language.num_layers)
    first = sum(counts[:stage])
    total = 0
    for adapted in _adapted(recipe):
        layer = adapted.linear.layer
        if layer is None:
            here = stage == 0
        else:
            here = first <= layer < first + counts[stage]
        if here:
            total += _of_map(adapted, recipe, tp=tp)
    return total


def part_adapters(recipe: Recipe, part: Part) -> int:
    """Count the parameters of a part's adapters, each once."""
    adapted = [each for each in _adapted(recipe) if each.linear.part == part]
    return sum(_of_map(each, recipe, tp=1) for each in adapted)


def _adapted(recipe: Recipe) -> list[AdaptedMap]:
    return adapted_maps(recipe.model, recipe.lora)


def _of_map(adapted: AdaptedMap, recipe: Recipe, *, tp: int) -> int:
    """Count A, B and norms of a map's adapters on a rank, split where the map is."""
    linear = adapted.linear
    inputs = linear.inputs * len(adapted.chosen)
    outputs = linear.outputs
    if linear.split == "row":
        inputs //= tp
    elif linear.split == "column":
        outputs //= tp
    norms = outputs if recipe.lora.dora else 0
    return recipe.lora.rank * (inputs + outputs) + norms
