"""The whole demo: `python -m examples.easy_vqa`. Restarted after an interruption, it continues
where it stopped."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from examples.commands import run, train
from examples.easy_vqa.prepare import Part
from megatron_vita.files import atomic_write

HERE = Path(__file__).parent
RUN = Path("runs/demo")
STAGES = (1, 2)
SEED = 1234
Figures = dict[str, dict[str, float]]
"""Share of right answers of each column of the report, by kind of question."""
VOCABULARY = 400
PROCESSES = 2


def prepare_data(overrides: Sequence[str]) -> None:
    """Make JSONL, tokenizer, shards, indexes and plans; each tool skips what exists."""
    run("-m", "examples.easy_vqa.prepare", str(RUN / "jsonl"))
    if not (RUN / "tokenizer.model").exists():
        # Training texts alone: those of validation must not shape the vocabulary.
        texts = map(str, sorted((RUN / "jsonl").glob("*-train.jsonl")))
        model = str(RUN / "tokenizer.model")
        sizes = ("--out", model, "--vocab-size", str(VOCABULARY))
        run("-m", "data_tools", "tokenizer", *texts, *sizes)
    for stage in STAGES:
        # Each stage has a plan of its own.
        recipe = str(HERE / f"stage{stage}.yaml")
        run("-m", "data_tools", "shard", recipe, "--strict")
        run("-m", "data_tools", "index", recipe)
        run("-m", "data_tools", "plan", recipe, *overrides)


def train_stage(stage: int, overrides: Sequence[str]) -> None:
    """Train a stage on two processes; the log goes to a file, progress to a bar."""
    train(
        HERE / f"stage{stage}.yaml",
        overrides=overrides,
        processes=PROCESSES,
        log=RUN / "logs" / f"stage{stage}.log",
        title=f"stage {stage}",
    )


def grade_and_report(part: Part) -> tuple[Path, Figures]:
    """Answer the questions of `part`, and write the report."""
    # Imported here: torch takes seconds to load, and the steps before do not need it.
    from examples.easy_vqa.grade import accuracy, grade
    from examples.easy_vqa.report import write_report
    from megatron_vita.checkpoint.store import find_checkpoint

    checkpoint = find_checkpoint(RUN / "checkpoints" / "stage2")
    graded, parameters = grade(checkpoint, RUN / "answers", part=part)
    report = RUN / "report.html"
    logs = [RUN / "tensorboard" / f"stage{stage}" for stage in STAGES]
    write_report(report, graded=graded, logs=logs, parameters=parameters, part=part)
    return report, {name: accuracy(rows) for name, rows in graded.items()}


def write_result(path: Path, figures: Figures, *, part: Part, seed: int, seconds: float) -> None:
    """Write the share of right answers of each column, by kind of question, as JSON."""
    result = {"part": part, "seed": seed, "minutes": round(seconds / 60, 1)}
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result | {"accuracy": figures}, indent=1) + "\n")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.easy_vqa", description=__doc__)
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help="seed of initial weights and order of samples; another one needs an empty runs/demo",
    )
    parser.add_argument(
        "--part",
        choices=get_args(Part),
        default="test",
        help="questions to answer: choose settings on validation, held out of the training split",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run all steps in order."""
    options = parse_arguments(arguments)
    overrides = (f"training.seed={options.seed}", f"data.seed={options.seed}")
    started = time.perf_counter()
    prepare_data(overrides)
    for stage in STAGES:
        train_stage(stage, overrides)
    report, figures = grade_and_report(options.part)
    for name, shares in figures.items():
        told = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items())
        tqdm.write(f"{name:>8}: {told}")
    seconds = time.perf_counter() - started
    result = RUN / "result.json"
    write_result(result, figures, part=options.part, seed=options.seed, seconds=seconds)
    tqdm.write(
        f"done in {seconds / 60:.1f} minutes; the report is {report}, its figures are {result}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
