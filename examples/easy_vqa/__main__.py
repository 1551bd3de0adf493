"""The whole demo: `python -m examples.easy_vqa`. Restarted after an interruption, it continues
where it stopped."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from examples.easy_vqa.prepare import PACKAGE

HERE = Path(__file__).parent
RUN = Path("runs/demo")
DATASETS = ("captions-train", "captions-validation", "questions-train", "questions-validation")
VOCABULARY = 400
PROCESSES = 2
STEP = re.compile(r"step (\d+)/(\d+) \| loss ([\d.]+)")


def run(*command: str) -> None:
    """Run a command with this environment's Python; a failure ends the demo."""
    # One thread per process: the demo's matrices are too small to gain from more.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, *command], env=environment).returncode:
        sys.exit(f"the demo stops: `{' '.join(command)}` failed; its message stands above")


def prepare_data() -> None:
    """Make JSONL, tokenizer, shards, indexes and plans; each tool skips what exists."""
    run("-m", "examples.easy_vqa.prepare", str(RUN / "jsonl"))
    if not (RUN / "tokenizer.model").exists():
        # Training texts alone: those of validation must not shape the vocabulary.
        texts = [
            str(RUN / "jsonl" / f"{name}.jsonl") for name in DATASETS if name.endswith("train")
        ]
        run(
            "-m",
            "data_tools",
            "tokenizer",
            *texts,
            "--out",
            str(RUN / "tokenizer.model"),
            "--vocab-size",
            str(VOCABULARY),
        )
    for name in DATASETS:
        run(*shard_command(RUN / "jsonl" / f"{name}.jsonl", RUN / "shards" / name))
    for stage in (1, 2):
        # Both stages share shards and indexes, and each has a plan of its own.
        recipe = str(HERE / f"stage{stage}.yaml")
        run("-m", "data_tools", "index", recipe)
        run("-m", "data_tools", "plan", recipe)


def shard_command(source: Path, out: Path) -> tuple[str, ...]:
    """Write shards of prepared samples, all of which must be valid."""
    return (
        "-m",
        "data_tools",
        "shard",
        str(source),
        "--out",
        str(out),
        "--media",
        str(PACKAGE),
        "--strict",
    )


def train_stage(stage: int) -> None:
    """Train a stage with torchrun on two processes; the log goes to a file, progress to a bar."""
    log = RUN / "logs" / f"stage{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "pretrain_vita.py", str(HERE / f"stage{stage}.yaml")],
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


def grade_and_report() -> Path:
    """Answer the test split and write the report."""
    # Imported here: torch takes seconds to load, and the steps before do not need it.
    from examples.easy_vqa.grade import accuracy, grade
    from examples.easy_vqa.report import write_report
    from megatron_vita.checkpoint.store import find_checkpoint

    checkpoint = find_checkpoint(RUN / "checkpoints" / "stage2")
    graded, parameters = grade(checkpoint, RUN / "answers")
    report = RUN / "report.html"
    logs = [RUN / "tensorboard" / f"stage{stage}" for stage in (1, 2)]
    write_report(report, graded=graded, logs=logs, parameters=parameters)
    for name, rows in graded.items():
        shares = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in accuracy(rows).items())
        tqdm.write(f"{name:>8}: {shares}")
    return report


def main() -> None:
    """Run all steps in order."""
    started = time.perf_counter()
    prepare_data()
    for stage in (1, 2):
        train_stage(stage)
    report = grade_and_report()
    tqdm.write(
        f"done in {(time.perf_counter() - started) / 60:.1f} minutes; the report is {report.resolve()}"
    )


if __name__ == "__main__":
    main()
