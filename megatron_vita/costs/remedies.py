"""Changes with which a recipe fits its devices, fastest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vita.config import Recipe
from megatron_vita.costs.changes import Changes, as_overrides, differences
from megatron_vita.costs.devices import H100, Device
from megatron_vita.costs.fitting import (
    LEANEST,
    LEVERS,
    NO_LEVERS,
    Room,
    fit_memory,
    leaner_optimizers,
)
from megatron_vita.costs.memory.memory import full_pack
from megatron_vita.costs.step_time import step_time
from megatron_vita.errors import ConfigError

NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Fields to change, and the predicted step time in seconds."""

    changes: Changes
    seconds: float


def find_remedies(
    recipe: Recipe, room: Room, *, world_size: int, device: Device | None
) -> list[Remedy]:
    """Find changes with which a run on `world_size` ranks fits its devices, fastest first.

    Args:
        recipe: the recipe that does not fit.
        room: memory available to a rank.
        world_size: ranks of the run.
        device: its rates decide which change is fastest; an H100 if None.
    """
    found = []
    for changes in _changes(recipe):
        # A size that divides neither heads nor ranks is no remedy.
        try:
            changed = recipe.replaced(changes | NO_LEVERS)
            replicas = changed.data_parallel_size(world_size)
        except ConfigError:
            continue
        # The least change of the optimizer that fits is enough.
        for candidate in (changed, *leaner_optimizers(changed)):
            fitted = fit_memory(candidate, room, data_parallel=replicas, device=device)
            if fitted is not None:
                seconds = step_time(
                    fitted, device or H100, data_parallel=replicas, load=full_pack(fitted)
                ).total
                needed = differences(recipe, fitted, (*changes, *LEVERS, *LEANEST))
                found.append(Remedy(changes=needed, seconds=seconds))
                break
    return sorted(found, key=lambda remedy: remedy.seconds)


def name_remedies(remedies: list[Remedy], *, timed: bool) -> str:
    """Describe the first remedies, with step times where rates are known."""
    if not remedies:
        return "more devices for each replica, or a smaller data.seq_length"
    parts = []
    for remedy in remedies[:NAMED]:
        text = as_overrides(remedy.changes)
        if timed:
            text += f" ({remedy.seconds:.3g} s a step)"
        parts.append(text)
    return ", or ".join(parts)


def _changes(recipe: Recipe) -> Iterator[Changes]:
    """Yield no change but levers, then a distributed optimizer, then each parallelism doubled."""
    # From the change that costs least to those that need other settings of data or cluster.
    yield {}
    sharded: Changes = {"parallel.use_distributed_optimizer": True}
    if not recipe.parallel.use_distributed_optimizer:
        yield sharded
    for kind in ("tensor_model", "context", "pipeline_model"):
        name = f"{kind}_parallel_size"
        size = 2 * getattr(recipe.parallel, name)
        wider = sharded | {f"parallel.{name}": size}
        # Tensor parallelism saves activations only with sequence parallelism; a pipeline needs the
        # packs of a step to divide by its stages.
        if kind == "tensor_model":
            wider |= {"parallel.sequence_parallel": True}
        if kind == "pipeline_model":
            packs = math.lcm(recipe.training.global_batch_size, size)
            wider |= {"training.global_batch_size": packs}
        yield wider
