"""Text report of suggested layouts."""

from collections.abc import Iterator

from megatron_vita.config import Recipe
from megatron_vita.costs.changes import as_overrides, differences
from megatron_vita.costs.devices import Device
from megatron_vita.costs.fitting import LEANEST, LEVERS, Room
from megatron_vita.costs.memory.memory import GIB, describe_full_pack
from megatron_vita.costs.suggest import Suggestion, Suggestions
from megatron_vita.costs.tables import align


def describe_suggestions(
    found: Suggestions, *, recipe: Recipe, world_size: int, device: Device, room: Room
) -> Iterator[str]:
    """Yield the lines of a table, the best layout as overrides, and the numbers of rejected
    layouts."""
    yield (
        f"{world_size} x {device.name} with {room.device / GIB:.1f} GiB, {room.host / GIB:.0f} GiB "
        f"of the host for each; packs are {describe_full_pack(recipe)}; fastest first:"
    )
    header = ("TP", "CP", "PP", "DP", "s a step", "tokens/s/GPU", "TFLOP/s/GPU")
    rows: list[tuple[str, ...]] = [(*header, "device GiB", "host GiB", "levers")]
    rows += [_row(suggestion, world_size) for suggestion in found.best]
    yield from align(rows, words_last=True)
    if found.best:
        yield f"the first: {as_overrides(found.best[0].changes) or 'as the recipe is'}"
    for objections in found.refused.values():
        yield f"{len(objections)} layouts are refused, such as: {objections[0]}"
    if found.too_large:
        yield f"{found.too_large} layouts take too much memory, whatever the levers"


def _row(suggestion: Suggestion, world_size: int) -> tuple[str, ...]:
    parallel = suggestion.recipe.parallel
    prediction = suggestion.prediction
    levers = {
        name.partition(".")[2]: value
        for name, value in differences(Recipe(), suggestion.recipe, (*LEVERS, *LEANEST)).items()
    }
    return (
        str(parallel.tensor_model_parallel_size),
        str(parallel.context_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(world_size // parallel.replica_size),
        f"{prediction.seconds:.2f}",
        f"{prediction.tokens_per_second_per_gpu:,.0f}",
        f"{prediction.tflops_per_gpu:.0f}",
        f"{suggestion.need.device / GIB:.1f}",
        f"{suggestion.need.host / GIB:.1f}",
        as_overrides(levers) or "none",
    )
