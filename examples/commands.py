"""Commands that examples run: this environment's Python, and training with a progress bar."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

STEP = re.compile(r"step (\d+)/(\d+) \| loss ([\d.]+)")
TRAINING = Path(__file__).parents[1] / "pretrain_vita.py"
LAUNCHER = ("-m", "megatron_vita.launch", "--standalone")
LINES_TOLD = 20  # of a run that fails


def run(*command: str, threads: int = 1) -> None:
    """Run a command with this environment's Python; a failure ends the example."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if subprocess.run([sys.executable, *command], env=environment).returncode:
        sys.exit(f"the example stops: `{' '.join(command)}` failed; its message stands above")


def train(recipe: Path, *, overrides: Sequence[str], processes: int, log: Path, title: str) -> None:
    """Train a recipe on `processes` ranks of this machine; the output goes to a file, progress to
    a bar."""
    log.parent.mkdir(parents=True, exist_ok=True)
    program = [str(TRAINING), str(recipe), *overrides]
    if processes > 1:
        program = [*LAUNCHER, "--nproc_per_node", str(processes), *program]
    process = subprocess.Popen(
        [sys.executable, *program],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = _follow(process, log=log, title=title)
    except BaseException:
        # An interrupted example must leave no run behind; a resumed one goes on from its checkpoint.
        process.terminate()
        process.wait()
        raise
    if process.wait():
        # Ranks mark their errors; a launcher that fails has none, and its last lines must do.
        told = [line for line in lines if " ERROR " in line] or lines
        sys.exit(
            f"the example stops: {title} failed; its log is {log}\n" + "".join(told[-LINES_TOLD:])
        )


def _follow(process: subprocess.Popen[str], *, log: Path, title: str) -> list[str]:
    """Copy the output of a run to `log`, show its steps in a bar, and return its lines."""
    assert process.stdout is not None
    lines = []
    # Appended, since a restart continues the run whose log this is; a line at a time, to be watched.
    with log.open("a", buffering=1) as file, tqdm(desc=title, unit="step") as bar:
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            if found := STEP.search(line):
                bar.total = int(found[2])
                bar.set_postfix_str(f"loss {found[3]}", refresh=False)
                # By the difference: a resumed run begins at a later step than the bar.
                bar.update(int(found[1]) - bar.n)
    return lines
