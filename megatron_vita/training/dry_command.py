"""Output of `pretrain_vita.py --dry-run` and `--suggest`."""

import argparse
import sys

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.costs.devices import Device
from megatron_vita.costs.fitting import NO_LEVERS, Room, fit_memory
from megatron_vita.costs.options import chosen_device, chosen_room, likely_device
from megatron_vita.costs.suggest import suggest
from megatron_vita.costs.suggest_report import describe_suggestions
from megatron_vita.errors import ConfigError
from megatron_vita.training.dry_report import check_memory, describe
from megatron_vita.training.dry_run import dry_run
from megatron_vita.training.metrics.wording import describe_levers


def run_dry(recipe: Recipe, options: argparse.Namespace, *, world_size: int) -> None:
    """Print the dry run, or suggested layouts.

    Raises:
        ConfigError: the run would not fit, or no layout does.
    """
    here = ""
    if platform.on_cuda():
        here = platform.device_name()
    if options.suggest:
        _print_suggestions(recipe, options, world_size=world_size, here=here)
        return
    device = chosen_device(options, here=here)
    room = chosen_room(options, device, here=platform.device_memory())
    if recipe.training.fit_memory:
        recipe = _fitted(recipe, room, device, world_size=world_size)
    report = dry_run(
        recipe,
        world_size=world_size,
        with_data=not options.without_data,
        device=device.name if device else "",
        ranks_per_node=options.ranks_per_node,
    )
    sys.stdout.write(describe(recipe, report, ranks_per_node=options.ranks_per_node) + "\n")
    if room.device:
        check_memory(recipe, report, room, device=device)


def _print_suggestions(
    recipe: Recipe, options: argparse.Namespace, *, world_size: int, here: str
) -> None:
    device = likely_device(options, here=here)
    room = chosen_room(options, device)
    found = suggest(
        recipe, room, world_size=world_size, device=device, ranks_per_node=options.ranks_per_node
    )
    lines = describe_suggestions(
        found, recipe=recipe, world_size=world_size, device=device, room=room
    )
    sys.stdout.write("\n".join(lines) + "\n")
    if not found.best:
        raise ConfigError(
            f"no layout of {world_size} devices fits: take more of them (--world-size), or a smaller "
            "data.seq_length"
        )


def _fitted(recipe: Recipe, room: Room, device: Device | None, *, world_size: int) -> Recipe:
    """Return the recipe with the levers that a run on such devices would choose."""
    if not room.device:
        raise ConfigError(
            "training.fit_memory: name the run's GPU with --device or its memory with "
            "--device-memory-gib"
        )
    plain = recipe.replaced(NO_LEVERS)
    replicas = recipe.data_parallel_size(world_size)
    fitted = fit_memory(plain, room, data_parallel=replicas, device=device)
    if fitted is None:
        # `check_memory` refuses it, with changes that would fit.
        return plain
    sys.stdout.write(f"training.fit_memory would choose: {describe_levers(fitted)}\n\n")
    return fitted
