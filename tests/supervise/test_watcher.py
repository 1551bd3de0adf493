"""The watcher hears only from its ranks, ends with the process that started it, and ends a job that
hangs with a report of the rank that the others wait for."""

import asyncio
import ctypes
import json
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.supervise.beacon import Beacon
from megatron_vita.supervise.hang import RankView
from megatron_vita.supervise.rank_failure import HUNG
from megatron_vita.supervise.watcher import Watcher, _Link
from tests.environment import environment_with

SETTINGS = {"timeout": 60.0, "token": "secret", "folder": "", "is_one_host": True}
TIMEOUT = 2.0
WAITING = {"name": "all_reduce", "number": 7, "sizes": [[3, 4]], "group": "dp", "ranks": [0, 1]}


@pytest.fixture
def watcher() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A watcher that nobody ends by a hang, and its port."""
    with watching(SETTINGS) as found:
        yield found


@contextmanager
def watching(settings: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a watcher, and kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_vita.supervise.watcher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment_with(),
        text=True,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(settings) + "\n")
    process.stdin.flush()
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def greet(port: int, token: str) -> bytes:
    """Introduce a rank, with a state if it knows the word; return the first line of the answer."""
    hello = {"rank": 0, "token": token, "host": "a", "pid": 1, "stack_file": "", "state_file": ""}
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        stream = connection.makefile("rwb")
        stream.write(json.dumps(hello).encode() + b"\n")
        if token == SETTINGS["token"]:
            stream.write(json.dumps({"state": {"idle": 0.0}}).encode() + b"\n")
        stream.flush()
        return stream.readline()


def test_who_does_not_know_the_word_is_not_heard(
    watcher: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = watcher
    assert greet(port, "guess") == b""
    assert greet(port, "secret") == b"{}\n"


def test_the_watcher_ends_with_the_first_rank(
    watcher: tuple[subprocess.Popen[str], int],
) -> None:
    process, _ = watcher
    assert process.stdin
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def test_the_watcher_imports_nothing_heavy() -> None:
    code = "import sys, megatron_vita.supervise.watcher; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment_with(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def _be_alone(port: int) -> None:
    beacon = Beacon(3, address=("127.0.0.1", port), token="", interval=0.1, timeout=0.5)
    beacon.enter("backward", step=7)
    time.sleep(60)


def test_a_rank_that_has_lost_its_watcher_ends_by_itself_when_it_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as lost:
        rank = multiprocessing.get_context("fork").Process(
            target=_be_alone, args=(lost.getsockname()[1],)
        )
        rank.start()
        connection, _ = lost.accept()
        connection.close()
        rank.join(30)
    assert rank.exitcode == HUNG


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_the_interpreter() -> None:
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _wait_for_a_pack() -> None:
    queue.Queue[int]().get()


HANGS: dict[str, tuple[Callable[[], None], str]] = {
    "stopped": (_stop, "is stopped (SIGSTOP)"),
    "native": (_hold_the_interpreter, "does not answer: native code holds its interpreter"),
    "loader": (_wait_for_a_pack, "waits for its loader: samples or their file system"),
}


def _be_rank(rank: int, port: int, kind: str) -> None:
    beacon = Beacon(
        rank,
        address=("127.0.0.1", port),
        token="secret",
        interval=TIMEOUT / 10,
        timeout=TIMEOUT,
        pending=lambda: [WAITING] if rank == 0 else [],
        awaited=lambda number, held_out: [f"awaited_{number}"],
    )
    beacon.enter("loading", step=5)
    time.sleep(TIMEOUT / 4)
    if rank == 1 and kind == "loader":
        beacon.enter("loading", micro_batch=3)
        _wait_for_a_pack()
    beacon.enter("forward", micro_batch=2, keys=[f"sample_{rank}"])
    if rank == 1:
        HANGS[kind][0]()
    time.sleep(60)


def test_a_job_does_not_hang_while_one_rank_goes_on() -> None:
    watcher = Watcher(timeout=10.0, token="", folder="", is_one_host=True)
    now = time.monotonic()
    for rank, idle in ((0, 500.0), (1, 2.0)):
        view = RankView(rank=rank, host="a", pid=rank, state={"phase": "saving", "idle": idle})
        watcher._links[rank] = _Link(
            view=view,
            files={},
            writer=None,
            heard=now,
            answers=asyncio.Queue(),
        )
    assert watcher._stuck_for() == 0
    watcher._links[1].view.state["idle"] = 20.0
    assert watcher._stuck_for() == pytest.approx(20.0, abs=1)


@pytest.mark.parametrize("kind", HANGS)
def test_a_job_that_hangs_ends_with_a_report_of_the_rank_it_waits_for(
    tmp_path: Path, kind: str
) -> None:
    context = multiprocessing.get_context("fork")
    with watching(SETTINGS | {"timeout": TIMEOUT, "folder": str(tmp_path)}) as (process, port):
        ranks = [context.Process(target=_be_rank, args=(rank, port, kind)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        try:
            for rank in ranks:
                rank.join(60)
            assert process.wait(30) == 0
        finally:
            for rank in ranks:
                rank.kill()  # one that is stopped would be waited for at exit
    assert ranks[0].exitcode == HUNG
    assert ranks[1].exitcode in (HUNG, -signal.SIGKILL)
    (report,) = (tmp_path / "hangs").iterdir()
    summary = report.read_text().splitlines()[0]
    assert "rank 1 on " in summary
    assert HANGS[kind][1] in summary
    where = "micro-batch 2, forward; samples sample_1"
    if kind == "loader":
        where = "micro-batch 3, loading; samples awaited_3"
    assert f"step 5, {where}" in summary
    # stacks of all ranks that have any to give
    assert report.read_text().count("in _be_rank") >= (1 if kind == "stopped" else 2)
