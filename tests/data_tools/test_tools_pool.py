"""The pool: what hangs or dies costs one step, with its reason; the rest of the task and all others
go on."""

import os
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from data_tools.workers.pool import WorkerOptions, run_tasks
from megatron_vita.errors import ConfigError, DataError, PlatformError
from tests.data_tools.pool_work import act, fall
from tests.forked import start_program

QUICK = WorkerOptions(workers=1, time_limit=1.0)


def outcomes(log: Path, *names: str, options: WorkerOptions = QUICK) -> list[str]:
    ((_, result),) = run_tasks(act, [(str(log), list(names))], options=options)
    return result


def test_a_step_that_hangs_is_bad_after_its_time_and_the_others_are_done(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert outcomes(tmp_path / "log", "a", "hang", "b") == [
        "a done",
        "it took longer than the time limit of 1 s",
        "b done",
    ]
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(("end", "how"), [("die", "signal SIGSEGV"), ("exit", "exit code 3")])
def test_a_step_that_takes_its_process_along_is_bad(tmp_path: Path, end: str, how: str) -> None:
    result = outcomes(tmp_path / "log", "a", end, "b", end, "c")
    reason = f"reading it ended the process with {how}"
    assert result == ["a done", reason, "b done", reason, "c done"]


def test_a_task_begun_again_knows_what_was_good_and_what_was_bad(tmp_path: Path) -> None:
    reported: list[int] = []
    tasks = [(str(tmp_path / "log"), ["a", "bad", "die", "b"])]
    ((_, result),) = run_tasks(act, tasks, options=QUICK, on_advance=reported.append)
    assert (result[1], sum(reported)) == ("it is bad", 4)
    assert (tmp_path / "log").read_text().splitlines() == ["a", "bad", "die", "a again", "b"]


def test_a_step_without_memory_is_bad(tmp_path: Path) -> None:
    for options in (QUICK, WorkerOptions(workers=0)):
        assert outcomes(tmp_path / "log", "full", "a", options=options) == [
            "it needs more memory than there is",
            "a done",
        ]


def test_each_task_is_done_once_by_any_number_of_workers(tmp_path: Path) -> None:
    tasks = [(str(tmp_path / f"log{i}"), [f"t{i}", "bad"]) for i in range(12)]
    for workers in (0, 1, 3):
        reported: list[int] = []
        results = dict(
            run_tasks(
                act, tasks, options=WorkerOptions(workers=workers), on_advance=reported.append
            )
        )
        assert results == {i: [f"t{i} done", "it is bad"] for i in range(12)}
        assert sum(reported) == 24


def test_errors_outside_steps_end_the_work() -> None:
    with pytest.raises(DataError, match="the user's fault"):
        list(run_tasks(fall, ["user error"], options=QUICK))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: our fault"):
        list(run_tasks(fall, ["bug"], options=QUICK))
    with pytest.raises(PlatformError, match=r"ended between two samples.*SIGKILL"):
        list(run_tasks(fall, ["die"], options=QUICK))


def test_workers_end_with_a_killed_watcher(tmp_path: Path) -> None:
    script = f"""
        from tests.data_tools.pool_work import act
        from data_tools.workers.pool import WorkerOptions, run_tasks
        list(run_tasks(act, [({str(tmp_path / "log")!r}, ["hang"])] * 2, options=WorkerOptions(workers=2, time_limit=600)))
    """
    run = start_program("-c", textwrap.dedent(script))
    deadline = time.monotonic() + 60
    while not ((tmp_path / "log").exists() and (tmp_path / "log").read_text().count("hang") == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 3  # the fork server and its two children
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": -1}, "--workers is -1"),
        ({"time_limit": 0.0}, "--time-limit is 0"),
        ({"executor": "slurm"}, "--executor is 'slurm'; known: local, ray"),
    ],
)
def test_crews_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerOptions(**fields)
