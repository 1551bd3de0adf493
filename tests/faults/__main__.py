"""Faults that a run must survive, tried one kind after the other: make faults [COUNT=N].

    python -m tests.faults [--count N] [--out FILE.json] [--only GROUP ...]

Prints a row for each kind: how often it was tried, survived and lost. COUNT=10 has 100 SIGKILLs over
runs of 200 steps, 50 changes of layout, and a run of 2,000 steps in which nothing may grow; COUNT=1
tries each kind once.
"""

import argparse
import atexit
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests import once
from tests.faults.damage import damage_checkpoints
from tests.faults.growth import run_long
from tests.faults.hangs import hang_jobs
from tests.faults.kills import kill_runs
from tests.faults.layouts import change_layouts
from tests.faults.nodes import lose_nodes
from tests.faults.rows import Row, as_table, write_rows

GROUPS: dict[str, Callable[[int, Path], list[Row]]] = {
    "damage": damage_checkpoints,
    "growth": run_long,
    "hangs": hang_jobs,
    "kills": kill_runs,
    "layouts": change_layouts,
    "nodes": lose_nodes,
}


def try_group(name: str, count: int, folder: Path) -> list[Row]:
    """Try the kinds of a group; one that breaks off is a row that says so, and costs no other."""
    try:
        return GROUPS[name](count, folder)
    except Exception:
        traceback.print_exc()
        return [Row(kind=f"{name}: broken off, see above", rule="", tried=1, lost=1)]


def main() -> int:
    """Try the kinds, print the table, and return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=1, help="times that each kind is tried")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups")
    options = parser.parse_args()
    began = time.monotonic()
    rows: list[Row] = []
    # Data that several groups make once.
    atexit.register(once.open_folder())
    with tempfile.TemporaryDirectory(prefix="vita_faults_") as folder:
        for name in options.only:
            place = Path(folder) / name
            place.mkdir()
            rows += try_group(name, options.count, place)
            sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s since the start\n")
    sys.stdout.write("\n".join(as_table(rows)) + "\n")
    if options.out:
        seconds = round(time.monotonic() - began)
        about = {"count": options.count, "cores": os.cpu_count(), "seconds": seconds}
        write_rows(rows, options.out, about=about)
    return int(any(row.lost for row in rows))


if __name__ == "__main__":
    sys.exit(main())
