"""vita train: train the stage that a recipe describes.

One process trains on one device. For more, torchrun --standalone --nproc_per_node GPUS -m
megatron_vita train RECIPE.yaml [group.field=value ...]
"""

import argparse
import logging
import os

from megatron_vita.config import describe_fields, load_recipe
from megatron_vita.costs.options import add_options
from megatron_vita.errors import VitaError


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
    """Train, and return the exit code; a user's error is one line and 1."""
    options = parse_arguments(arguments, name=name)
    try:
        _run(options)
    except VitaError as error:
        logging.getLogger("megatron_vita").error("%s", error)
        return 1
    return 0


def dry_run(arguments: list[str], *, name: str) -> int:
    """Do as `main` with `--dry-run`."""
    return main(["--dry-run", *arguments], name=name)


def _run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    from megatron_vita import platform  # imports torch: after the recipe has been checked

    world_size = (
        options.world_size or int(os.environ.get("WORLD_SIZE", "0")) or recipe.parallel.replica_size
    )
    if options.scale == "tiny":
        from data_tools.miniature import open_miniature

        recipe = open_miniature(
            recipe, world_size=world_size, alone=options.dry_run or options.suggest
        )
    if options.dry_run or options.suggest:
        from megatron_vita.training.dry_command import run_dry

        run_dry(recipe, options, world_size=world_size)
        return
    from megatron_vita.training.loop import train

    train(recipe)
    platform.leave_process()
