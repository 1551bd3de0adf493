"""Cases of the training benchmark in processes of their own: those of one layout in the same, until
one does not end well."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from training_cases import Case
from training_results import read_result, stamp, write_result

HERE = Path(__file__).parent
GRACE = 60
"""Seconds that torchrun is given to end its processes, which it does after 30 by force."""


def run_cases(
    cases: list[Case], out: Path, *, timeout: float, apart: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure cases one after another and yield their results, which are also in the folder `out`.

    Neighbours of one layout share processes, which saves their start; a case that ends badly takes
    its processes with it, and the next one has fresh ones. `apart`: no processes are shared.
    `timeout` is of a case, in seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting = list(cases)
    for case in waiting:
        _result_of(case, out).unlink(missing_ok=True)
    while waiting:
        first = waiting[0]
        shared = list(takewhile(lambda case: _fits(case, first), waiting))  # noqa: B023
        code = _start(shared[:1] if apart else shared, out, timeout=timeout)
        finished = [case for case in shared if _is_complete(case, out)]
        for case in finished:
            yield read_result(_result_of(case, out))
        waiting = waiting[len(finished) :]
        if waiting and (not finished or _was_begun(waiting[0], out)):
            yield _note_end(waiting.pop(0), out, code)


def _fits(case: Case, first: Case) -> bool:
    """True if two cases can run one after another in the same processes."""
    return (case.layout, case.peer) == (first.layout, first.peer)


def _result_of(case: Case, out: Path) -> Path:
    return out / f"{case.name}.json"


def _is_complete(case: Case, out: Path) -> bool:
    return read_result(_result_of(case, out)).get("status") == "complete"


def _was_begun(case: Case, out: Path) -> bool:
    return _result_of(case, out).exists()


def _start(cases: list[Case], out: Path, *, timeout: float) -> int | None:
    """Exit code of the processes that measure `cases`; None if they were ended because a case took
    too long."""
    options = out / "cases.options"
    options.write_text(json.dumps([asdict(case) for case in cases]))
    worker = "training_worker.py"
    if cases[0].peer:
        worker = "training_peer.py"
    command = [*launcher(cases[0].gpus), str(HERE / worker), str(options), str(out)]
    try:
        return _run(
            command,
            timeout=timeout,
            finished=lambda: sum(_is_complete(case, out) for case in cases),
        )
    finally:
        options.unlink()


def launcher(processes: int) -> list[str]:
    """The command that starts a script in `processes` processes of this host."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(processes)]


def _run(command: list[str], *, timeout: float, finished: Callable[[], int]) -> int | None:
    """Exit code of a command; None if it was ended after `timeout` seconds in which no case was
    finished."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment)
    done = -1
    try:
        while finished() > done:
            done = finished()
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                continue
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Let torchrun end its processes and itself; kill it if it does not."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _note_end(case: Case, out: Path, code: int | None) -> dict[str, Any]:
    """Record why a case was not completed, beside what it has measured."""
    path = _result_of(case, out)
    result = read_result(path) or {"case": case.name, "options": asdict(case), **stamp()}
    result |= _outcome(code, path.with_suffix(".oom"))
    write_result(path, result)
    return result


def _outcome(code: int | None, note: Path) -> dict[str, str]:
    """Status for an exit code, or for the note of a process without memory."""
    if note.exists():
        message = note.read_text()
        note.unlink()
        return {"status": "out of memory", "message": message}
    if code is None:
        return {"status": "timed out"}
    return {"status": "failed", "message": f"exit code {code}"}
