"""Trains a stage: torchrun --nproc_per_node GPUS pretrain_vita.py RECIPE.yaml [group.field=value
...]"""

import argparse
import logging
import os
import sys

from megatron_vita.config import Recipe, describe_fields, load_recipe
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
    dry = parser.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="show and check what the run would be, on this machine alone",
    )
    dry.add_argument(
        "--world-size", type=int, default=0, help="ranks of the run; one replica if not given"
    )
    dry.add_argument(
        "--device", default="", help="GPU to predict the time of a step for, such as H200"
    )
    dry.add_argument("--ranks-per-node", type=int, default=8, help="ranks of a node")
    dry.add_argument(
        "--device-memory-gib", type=float, default=0, help="refuse a run estimated to need more"
    )
    dry.add_argument(
        "--without-data", action="store_true", help="leave the plan and its packs unread"
    )
    return parser.parse_intermixed_args()  # overrides may follow options


def show_dry_run(recipe: Recipe, world_size: int, arguments: argparse.Namespace) -> None:
    """Prints what the run would be; ConfigError if it would not fit."""
    from megatron_vita import platform
    from megatron_vita.training.dry_report import check_memory, describe
    from megatron_vita.training.dry_run import dry_run

    report = dry_run(
        recipe,
        world_size=world_size,
        with_data=not arguments.without_data,
        device=arguments.device or platform.device_name(),
        ranks_per_node=arguments.ranks_per_node,
    )
    sys.stdout.write(describe(recipe, report, ranks_per_node=arguments.ranks_per_node) + "\n")
    if arguments.device_memory_gib:
        check_memory(report, arguments.device_memory_gib)


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

            recipe = open_miniature(recipe, world_size=world_size, alone=arguments.dry_run)
        if arguments.dry_run:
            show_dry_run(recipe, world_size, arguments)
            return
        from megatron_vita.training.loop import train

        train(recipe)
        platform.leave_process()
    except VitaError as error:
        logging.getLogger("megatron_vita").error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
