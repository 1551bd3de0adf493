"""A long run that saves, uploads and validates: what its processes hold does not grow."""

import json
import statistics
import sys
from pathlib import Path

from tests.faults.job import make_run, start
from tests.faults.rows import Row

STEPS = 200
"""Steps for each time that the kind is tried: 2,000 with COUNT=10."""
FEWEST = 400
RANKS = 2
MOST_GROWTH = {"memory (MiB)": 16.0, "file handles": 0, "threads": 0, "shared memory (MiB)": 0}
"""Growth from the second quarter of the run to the last one that counts as none. Allocators keep
some memory more."""


def run_long(count: int, folder: Path) -> list[Row]:
    """Train for `count` times STEPS, and compare what each rank and its loaders hold, early and
    late."""
    steps = max(FEWEST, STEPS * count)
    recipe = make_run(folder / "toy", steps=steps)
    mirror = f"checkpoint.mirror=file://{folder / 'store'}"
    validating = ["training.eval_interval=25", "training.eval_iters=1"]
    assert start(recipe, folder / "run", mirror, *validating, worker="measured.py") == 0
    rows = []
    for kind, most in MOST_GROWTH.items():
        row = Row(kind=f"{steps:,} steps: {kind}", rule=f"grows by at most {most:g}")
        for rank in range(RANKS):
            early, late = _early_and_late(folder / "run" / f"held.{rank}", kind)
            sys.stderr.write(f"rank {rank}: {kind} {early:g}, then {late:g}\n")
            row.count(late - early <= most)
        rows.append(row)
    return rows


def _early_and_late(path: Path, kind: str) -> tuple[float, float]:
    """Medians of the second quarter of a run and of its last one."""
    values = [json.loads(line)[kind] for line in path.read_text().splitlines()]
    quarter = len(values) // 4
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
