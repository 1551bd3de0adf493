"""Search for the fastest layouts of a recipe on a number of devices, each with fitting levers."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vita.config import Recipe
from megatron_vita.costs.changes import Changes, differences
from megatron_vita.costs.devices import Device
from megatron_vita.costs.fitting import (
    LEANEST,
    LEVERS,
    NO_LEVERS,
    Need,
    Room,
    fit_memory,
    leaner_optimizers,
    memory_need,
    smallest,
)
from megatron_vita.costs.memory.memory import full_pack
from megatron_vita.costs.prediction import Prediction, predict
from megatron_vita.costs.step_time import step_time
from megatron_vita.errors import ConfigError

LAYOUT = (
    "parallel.tensor_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.sequence_parallel",
    "parallel.cp_comm_type",
    "parallel.hierarchical_context_parallel_sizes",
    "parallel.vision_tensor_parallel",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.num_layers_in_first_pipeline_stage",
    "parallel.num_layers_in_last_pipeline_stage",
)
"""Fields of a layout that are chosen."""
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A layout with its levers and predicted costs."""

    recipe: Recipe
    changes: Changes  # from the recipe that was given
    need: Need
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """The best layouts, fastest first, and the reasons against the others."""

    best: list[Suggestion]
    refused: dict[str, list[str]]  # objections of the recipe to layouts, by their form
    too_large: int  # layouts whose least need is more than the room


def suggest(
    recipe: Recipe, room: Room, *, world_size: int, device: Device, ranks_per_node: int
) -> Suggestions:
    """Find the fastest layouts for `world_size` devices with `room` for each rank."""
    valid, refused = _valid_layouts(recipe, world_size, ranks_per_node)
    bounds: list[tuple[float, Recipe]] = []
    for layout in valid:
        replicas = layout.data_parallel_size(world_size)
        lean = _least_lean(layout, room, replicas)
        if lean is not None:
            bounds.append((_least_seconds(lean, device, replicas, ranks_per_node), lean))
    too_large = len(valid) - len(bounds)
    best: list[Suggestion] = []
    for seconds, layout in sorted(bounds, key=lambda bound: bound[0]):
        # Sorted by a lower bound: none of the rest can be faster, whatever its levers.
        if len(best) >= SHOWN and seconds > _seconds(best[SHOWN - 1]):
            break
        replicas = layout.data_parallel_size(world_size)
        fitted = fit_memory(layout, room, data_parallel=replicas, device=device)
        if fitted is None:
            too_large += 1
            continue
        best.append(_suggestion(recipe, fitted, world_size, device, ranks_per_node=ranks_per_node))
        best.sort(key=_seconds)
    return Suggestions(best=best[:SHOWN], refused=refused, too_large=too_large)


def _seconds(suggestion: Suggestion) -> float:
    return suggestion.prediction.seconds or 0.0


def _suggestion(
    recipe: Recipe, fitted: Recipe, world_size: int, device: Device, *, ranks_per_node: int
) -> Suggestion:
    prediction = predict(
        fitted,
        full_pack(fitted),
        world_size=world_size,
        device=device.name,
        ranks_per_node=ranks_per_node,
    )
    replicas = fitted.data_parallel_size(world_size)
    return Suggestion(
        recipe=fitted,
        changes=differences(recipe, fitted, (*LAYOUT, *LEVERS, *LEANEST)),
        need=memory_need(fitted, data_parallel=replicas),
        prediction=prediction,
    )


def _least_lean(layout: Recipe, room: Room, replicas: int) -> Recipe | None:
    """Return the layout with the least lean optimizer that fits the device; None if none does."""
    # Checked with the levers that need least memory: only layouts that no lever helps get a leaner
    # optimizer, which rounds differently.
    for candidate in (layout, *leaner_optimizers(layout)):
        if memory_need(smallest(candidate), data_parallel=replicas).fits_device(room):
            return candidate
    return None


def _least_seconds(recipe: Recipe, device: Device, replicas: int, ranks_per_node: int) -> float:
    """Return the time of a step without recomputation: a lower bound for all levers."""
    plain = recipe.replaced(NO_LEVERS | {"training.recompute_vision": False})
    load = full_pack(recipe)
    return step_time(
        plain, device, data_parallel=replicas, load=load, ranks_per_node=ranks_per_node
    ).total


def _valid_layouts(
    recipe: Recipe, world_size: int, ranks_per_node: int
) -> tuple[list[Recipe], dict[str, list[str]]]:
    """Return the layouts that pass the recipe's checks, and the errors of the others.

    Errors are grouped by their text without numbers, the same for all sizes.
    """
    valid: list[Recipe] = []
    refused: dict[str, list[str]] = {}
    # The recipe's own checks decide, so that none of their rules is written twice.
    for changes in _layouts(recipe, world_size, ranks_per_node):
        try:
            layout = recipe.replaced(changes | NO_LEVERS)
            layout.data_parallel_size(world_size)
        except ConfigError as error:
            refused.setdefault(re.sub(r"\d+", "", str(error)), []).append(str(error))
        else:
            valid.append(layout)
    return valid, refused


def _layouts(recipe: Recipe, world_size: int, ranks_per_node: int) -> Iterator[Changes]:
    """Yield TP (inside a node), CP and PP in powers of two."""
    parallel = recipe.parallel
    layers = recipe.model.language.num_layers
    sizes = [1 << i for i in range(world_size.bit_length())]
    for tp, cp, pp in itertools.product(sizes, sizes, sizes):
        # TP communicates in every layer, too often for links between nodes.
        if world_size % (tp * cp * pp) or tp > ranks_per_node or pp > layers:
            continue
        # The hierarchical scheme needs sizes of its own for every CP: a ring instead.
        comm_type = parallel.cp_comm_type
        if comm_type == "a2a+p2p":
            comm_type = "p2p"
        yield {
            "parallel.tensor_model_parallel_size": tp,
            "parallel.context_parallel_size": cp,
            "parallel.pipeline_model_parallel_size": pp,
            "parallel.sequence_parallel": tp > 1,
            "parallel.cp_comm_type": comm_type,
            "parallel.hierarchical_context_parallel_sizes": [],
            "parallel.vision_tensor_parallel": parallel.vision_tensor_parallel and tp > 1,
            "parallel.virtual_pipeline_model_parallel_size": 1,
            "parallel.num_layers_in_first_pipeline_stage": 0,
            "parallel.num_layers_in_last_pipeline_stage": 0,
        }
