"""Trains a stage: torchrun --nproc_per_node GPUS pretrain_vita.py RECIPE.yaml [group.field=value
...]"""

import argparse
import logging
import os
import sys

from megatron_vita.config import describe_fields, load_recipe
from megatron_vita.costs.options import add_options
from megatron_vita.errors import VitaError


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` lists every field of a recipe."""
    parser = argparse.ArgumentParser(
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
    return parser.parse_intermixed_args()  # overrides may follow options


def main() -> None:
    """Reads the recipe and trains; a user's error is one line and exit code 1."""
    arguments = parse_arguments()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from megatron_vita import platform  # imports torch: after the recipe has been checked

        world_size = (
            arguments.world_size
            or int(os.environ.get("WORLD_SIZE", "0"))
            or recipe.parallel.replica_size
        )
        if arguments.scale == "tiny":
            from data_tools.miniature import open_miniature

            recipe = open_miniature(
                recipe, world_size=world_size, alone=arguments.dry_run or arguments.suggest
            )
        if arguments.dry_run or arguments.suggest:
            from megatron_vita.training.dry_command import run_dry

            run_dry(recipe, arguments, world_size=world_size)
            return
        from megatron_vita.training.loop import train

        train(recipe)
        platform.leave_process()
    except VitaError as error:
        logging.getLogger("megatron_vita").error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
