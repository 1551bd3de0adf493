"""Long-VITA's four stages with a small model: `python -m examples.four_stages`, or one stage of it,
`python -m examples.four_stages stage 3`. Restarted after an interruption, it continues where it
stopped; what is finished is skipped."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.commands import run as run_command
from examples.commands import train
from examples.four_stages.prepare import prepare, write_held_out, write_training_sets
from examples.four_stages.run_folder import FOLDER, STAGES, RunFolder
from examples.four_stages.served_film import write_film
from megatron_vita.config import Recipe
from megatron_vita.errors import ConfigError, VitaError

logger = logging.getLogger(__name__)
REPORT = "report.html"
RESULTS = "results.json"
PREPARING = ("all", "prepare", "stage")
TRAINING = ("all", "stage")
SCORING = ("all", "stage", "score")
WORK = ("all", "prepare", "stage", "score", "report", "film")


def prepare_stages(run: RunFolder, stages: Sequence[int], options: argparse.Namespace) -> None:
    """Make the data of stages, unless their training is finished, and the questions of the tests."""
    fields = tuple(options.overrides)
    check_stage_before(run, min(stages))
    open_stages = [
        stage
        for stage in stages
        if run.steps_done(stage) < run.recipe(stage, fields).training.train_iters
    ]
    # First what is drawn in forked processes: what comes then starts threads.
    for stage in open_stages:
        write_training_sets(run, stage, material=options.material)
    write_held_out(run, material=options.material)
    for stage in open_stages:
        prepare(run, stage, material=options.material, overrides=fields)


def check_stage_before(run: RunFolder, stage: int) -> None:
    """Check that the stage that a stage starts from was trained to its end.

    Raises:
        ConfigError: it was not begun.
    """
    if stage == STAGES[0]:
        return
    done = run.steps_done(stage - 1)
    wanted = run.recipe(stage - 1).training.train_iters
    if done == 0:
        raise ConfigError(
            f"{run.checkpoints(stage - 1)}: holds no checkpoint, and stage {stage} starts from it: run stage "
            f"{stage - 1} first"
        )
    if done < wanted:
        logger.warning(
            "stage %d starts from step %d of stage %d, whose recipe has %d",
            stage,
            done,
            stage - 1,
            wanted,
        )


def train_stage(run: RunFolder, stage: int, options: argparse.Namespace) -> None:
    """Train a stage, unless that is done."""
    check_stage_before(run, stage)
    recipe = run.recipe(stage, tuple(options.overrides))
    if run.steps_done(stage) < recipe.training.train_iters:
        train(
            run.recipe_file(stage),
            overrides=[
                *run.overrides(stage),
                *options.overrides,
                *split_packs(recipe, processes=options.processes),
            ],
            processes=options.processes,
            log=run.log(stage),
            title=f"stage {stage}",
        )


def split_packs(recipe: Recipe, *, processes: int) -> list[str]:
    """Fields that split each pack over the ranks, where a step has too few packs to go round."""
    replicas = processes // recipe.parallel.replica_size
    if recipe.training.global_batch_size % max(replicas, 1) == 0:
        return []
    return [f"parallel.context_parallel_size={processes}"]


def score_in_own_process(stage: int, options: argparse.Namespace) -> None:
    """Score a stage in a process of its own: its engine fills the GPU, which the next stage needs."""
    words = ["--folder", str(options.folder), "--material", str(options.material)]
    words += ["--seed", str(options.seed)]
    if options.miniature:
        words.append("--miniature")
    run_command("-m", "examples.four_stages", "score", str(stage), *words)


def score_stage(run: RunFolder, stage: int, options: argparse.Namespace) -> None:
    """Answer the held-out questions with a stage's newest checkpoint."""
    # Imported here: torch takes seconds to load.
    from examples.four_stages.score import score

    write_held_out(run, material=options.material)
    score(run, stage)


def write_pages(run: RunFolder) -> None:
    """Write results.json and report.html of all seeds that have scores."""
    from examples.four_stages.report import write_report
    from examples.four_stages.results import write_results

    runs = run.all_seeds()
    if not runs:
        raise ConfigError(f"{run.folder}: holds no scores; run a stage first")
    write_results(run.folder / RESULTS, runs)
    write_report(run.folder / REPORT, runs)
    logger.info("the report is %s, its figures are %s", run.folder / REPORT, run.folder / RESULTS)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.four_stages", description=__doc__)
    parser.add_argument("work", nargs="?", choices=WORK, default="all", help="default: all")
    parser.add_argument("words", nargs="*", metavar="stage and overrides",
                        help="number of the stage (of prepare, stage, score; default: all), then fields "
                        "of its recipe, such as training.train_iters=50")  # fmt: skip
    parser.add_argument("--folder", type=Path, help=f"folder of data and runs (default: {FOLDER})")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of the recipes")
    parser.add_argument(
        "--miniature", action="store_true", help="tiny model and data, for a minute on a laptop"
    )
    parser.add_argument("--processes", type=int, default=1, help="ranks that train, one a GPU")
    parser.add_argument(
        "--material", type=Path, help="folder of the packages' files (default: in the folder)"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.words and options.work not in (*PREPARING, *SCORING):
        parser.error(f"{options.work} takes no {' '.join(options.words)}")
    numbers = [int(word) for word in options.words if word.isdecimal()]
    options.overrides = [word for word in options.words if "=" in word]
    options.stages = numbers or list(STAGES)
    if not set(options.stages) <= set(STAGES) or len(numbers) + len(options.overrides) < len(
        options.words
    ):
        parser.error(f"{' '.join(options.words)}: stages are 1 to 4, fields are group.field=value")
    default = f"{FOLDER}_miniature" if options.miniature else FOLDER
    options.folder = options.folder or Path(default)
    options.material = options.material or options.folder / "material"
    return options


def main(arguments: Sequence[str]) -> None:
    """Do what the command line asks for."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = RunFolder(folder=options.folder, seed=options.seed, miniature=options.miniature)
    try:
        if options.work in PREPARING:
            prepare_stages(run, options.stages, options)
        for stage in options.stages:
            if options.work in TRAINING:
                train_stage(run, stage, options)
                score_in_own_process(stage, options)
            if options.work == "score":
                score_stage(run, stage, options)
        if options.work in ("all", "report"):
            write_pages(run)
        if options.work == "film":
            logger.info("the film is %s", write_film(run.folder))
    except VitaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
