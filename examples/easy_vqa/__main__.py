"""The whole demo: `python -m examples.easy_vqa`. Restarted after an interruption, it continues
where it stopped."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

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
STEP = re.compile(r"step (\d+)/(\d+) \| loss ([\d.]+)")


def run(*command: str) -> None:
    """Run a command with this environment's Python; a failure ends the demo."""
    # One thread per process: the demo's matrices are too small to gain from more.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, *command], env=environment).returncode:
        sys.exit(f"the demo stops: `{' '.join(command)}` failed; its message stands above")


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
    """Train a stage with torchrun on two processes; the log goes to a file, progress to a bar."""
    log = RUN / "logs" / f"stage{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    process = subprocess.Popen(
        [
            sys.executable,
            *torchrun,
            "pretrain_vita.py",
            str(HERE / f"stage{stage}.yaml"),
            *overrides,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    # Appended, since a restart continues the run whose log this is.
    with log.open("a") as file, tqdm(desc=f"stage {stage}", unit="step") as bar:
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            if found := STEP.search(line):
                bar.total = int(found[2])
                bar.set_postfix_str(f"loss {found[3]}", refresh=False)
                # By the difference: a resumed run begins at a later step than the bar.
                bar.update(int(found[1]) - bar.n)
    if process.wait():
        # Ranks mark their errors; a launcher that fails has none, and its last lines must do.
        told = [line for line in lines if " ERROR " in line] or lines
        sys.exit(f"the demo stops: stage {stage} failed; its log is {log}\n" + "".join(told[-20:]))


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
