"""vita train: train the stage that a recipe describes.

One process trains on one device. For more, python -m megatron_vita.launch --standalone
--nproc_per_node GPUS -m megatron_vita train RECIPE.yaml [group.field=value ...], or torchrun
"""

import argparse
import os
import sys
import time

from megatron_vita.config import Recipe, describe_fields, load_recipe
from megatron_vita.costs.options import add_options
from megatron_vita.supervise.rank_failure import note_checkpoints, report_failure


def parse_arguments(arguments: list[str], *, name: str) -> argparse.Namespace:
    """Parse the command line; `--help` lists every field of a recipe."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=__doc__,
        epilog="Fields of a recipe:\n" + "\n".join(describe_fields()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="the stage's recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="group.field=value", help="fields that replace the recipe's"
    )
    parser.add_argument(
        "--scale",
        choices=["full", "tiny"],
        default="full",
        help="tiny: a miniature on made-up data",
    )
    add_options(parser)
    return parser.parse_intermixed_args(arguments)  # overrides may follow options


def main(arguments: list[str], *, name: str) -> int:
    """Train, and return the exit code; a user's error is one line, of one rank, and 1."""
    checkpoints = None
    try:
        options = parse_arguments(arguments, name=name)  # may import plugins, for their names
        is_dry = options.dry_run or options.suggest
        recipe = load_recipe(options.recipe, options.overrides)
        if not is_dry:
            _say(f"training {options.recipe}: importing PyTorch and megatron-core")
        world_size = (
            options.world_size
            or int(os.environ.get("WORLD_SIZE", "0"))
            or recipe.parallel.replica_size
        )
        world_size = recipe.ranks_in_use(world_size)
        if options.scale == "tiny":
            from data_tools.miniature import open_miniature

            recipe = open_miniature(recipe, world_size=world_size, alone=is_dry)
        if is_dry:
            from megatron_vita.training.dry_command import run_dry

            run_dry(recipe, options, world_size=world_size)
        else:
            checkpoints = recipe.checkpoint.save
            _train(recipe)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, checkpoints=checkpoints)
    return 0


def dry_run(arguments: list[str], *, name: str) -> int:
    """Do as `main` with `--dry-run`."""
    return main(["--dry-run", *arguments], name=name)


def _say(text: str) -> None:
    """Say at once what begins, on rank 0: logging is set up only after seconds of imports."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} INFO {text}\n")
        sys.stderr.flush()


def _train(recipe: Recipe) -> None:
    note_checkpoints(recipe.checkpoint.save)
    from megatron_vita import platform  # imports torch: after the recipe has been checked
    from megatron_vita.training.loop import train
    from megatron_vita.training.spares import spares_end, take_part

    if not take_part(recipe):
        return
    with spares_end(recipe):
        train(recipe)
    platform.destroy_process_group()
