"""Changes of a recipe with which it fits its devices, fastest first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vita.config import Recipe
from megatron_vita.costs.changes import Changes, as_overrides, change, differences
from megatron_vita.costs.devices import H100, Device
from megatron_vita.costs.fitting import (
    LEANEST,
    LEVERS,
    NO_LEVERS,
    Room,
    fit_memory,
    leaner_optimizers,
)
from megatron_vita.costs.memory import full_pack
from megatron_vita.costs.step_time import step_time
from megatron_vita.errors import ConfigError

NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Fields to change, and the seconds of a step then."""

    changes: Changes
    seconds: float


def find_remedies(
    recipe: Recipe, room: Room, *, world_size: int, device: Device | None
) -> list[Remedy]:
    """What makes a run of `world_size` ranks fit, fastest first.

    device: whose rates say what is fastest; an H100 if not known.
    """
    found = []
    for changes in _changes(recipe):
        try:
            changed = change(recipe, changes | NO_LEVERS)
            replicas = changed.data_parallel_size(world_size)
        except ConfigError:
            continue
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
    """The first ones in words, with the seconds of a step where rates are known."""
    if not remedies:
        return "more devices for each replica, or a smaller data.seq_length"
    parts = []
    for remedy in remedies[:NAMED]:
        seconds = f" ({remedy.seconds:.3g} s a step)" if timed else ""
        parts.append(as_overrides(remedy.changes) + seconds)
    return ", or ".join(parts)


def _changes(recipe: Recipe) -> Iterator[Changes]:
    """Nothing but levers, then a distributed optimizer, then each kind of parallelism doubled."""
    yield {}
    sharded: Changes = {"parallel.use_distributed_optimizer": True}
    if not recipe.parallel.use_distributed_optimizer:
        yield sharded
    for kind in ("tensor_model", "context", "pipeline_model"):
        name = f"{kind}_parallel_size"
        size = 2 * getattr(recipe.parallel, name)
        wider = sharded | {f"parallel.{name}": size}
        if kind == "tensor_model":
            wider |= {"parallel.sequence_parallel": True}
        if kind == "pipeline_model":
            packs = math.lcm(recipe.training.global_batch_size, size)
            wider |= {"training.global_batch_size": packs}
        yield wider
