"""Jobs that hang: each ends by itself, and its report names rank, phase and samples."""

import re
import sys
from pathlib import Path

from megatron_vita.supervise.rank_failure import HUNG
from tests.faults.rows import Row
from tests.functional.hang_job import processes_left, run_hanging
from tests.functional.hang_kinds import HANG_SECONDS, HANGS

MOST_SECONDS = 3 * HANG_SECONDS
RULE = (
    f"right rank, phase and samples reported within {MOST_SECONDS:g} s where training.hang_seconds is "
    f"{HANG_SECONDS:g}, exit code {HUNG}, no rank left"
)


def hang_jobs(count: int, folder: Path) -> list[Row]:
    """Let jobs hang in each way."""
    rows = []
    for kind in HANGS:
        row = Row(kind=f"hang: {kind}", rule=RULE)
        reported = []
        for number in range(count):
            place = folder / f"{kind.replace(' ', '_')}_{number}"
            place.mkdir()
            seconds, is_right = _hang(kind, place)
            if seconds is not None:
                reported.append(seconds)
            row.count(is_right and seconds is not None and seconds < MOST_SECONDS)
        if reported:
            row.seconds = round(sum(reported) / len(reported), 2)
        rows.append(row)
    return rows


def _hang(kind: str, folder: Path) -> tuple[float | None, bool]:
    """Return the seconds from the hang to its report, None if there is none, and whether the report
    is right."""
    ended = run_hanging(kind, folder)
    reports = list((folder / "hangs").glob("*"))
    if len(reports) != 1 or ended.returncode != HUNG:
        sys.stderr.write(f"hang {kind}: {reports}, exit {ended.returncode}\n{ended.stderr[-2000:]}")
        return None, False
    text = reports[0].read_text()
    seconds = reports[0].stat().st_mtime - float((folder / "began").read_text())
    is_named = re.search(rf"rank 1 on \S+ {HANGS[kind].said}", text.splitlines()[0]) is not None
    sys.stderr.write(f"hang {kind}: {seconds:.1f} s: {text.splitlines()[0]}\n")
    return seconds, is_named and not processes_left(text)
