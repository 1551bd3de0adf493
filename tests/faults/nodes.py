"""Two nodes of an elastic job: one is lost, by its death or by a cut of its link, and comes back.
Training goes on with half of the replicas, then with all, and the losses stay those of a run that
loses nothing.

Each node is a launcher with a rank in a network namespace of its own, joined by a virtual cable;
that needs root. The first node holds the rendezvous, and is not lost.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.environment import ROOT, environment_with
from tests.faults.job import BATCH, SETTINGS, make_run, packs_of, start, steps_of
from tests.faults.layouts import MOST_DIFFERENCE
from tests.faults.rows import Row

STEPS = 30
ALONE_AT = 10
"""Step after which the second node is lost."""
BACK_AT = 20
"""Step after which the first one, alone, waits for the second."""
HANG_SECONDS = 8
PORT = 29411
CONF = "last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=5,join_timeout=200"
START_SECONDS = 180.0
RULE = (
    f"losses within {MOST_DIFFERENCE:g} of a run without faults, each pack consumed once, with both "
    "nodes again at the end"
)


def lose_nodes(count: int, folder: Path) -> list[Row]:
    """Lose a node in each way, and let it come back."""
    recipe = make_run(folder / "toy", steps=STEPS)
    assert start(recipe, folder / "whole") == 0, "the run without faults fails"
    rows = []
    for kind in ("node killed, then back", "link of a node cut, then back"):
        row = Row(kind=kind, rule=RULE)
        for number in range(count):
            place = folder / f"{kind.split()[0]}_{number}"
            place.mkdir()
            row.count(_is_survived(recipe, place, folder / "whole", cuts=kind.startswith("link")))
        rows.append(row)
    return rows


def _is_survived(recipe: Path, folder: Path, whole: Path, *, cuts: bool) -> bool:
    with cable() as (near, far):
        first = Node(near, recipe, folder, is_host=True)
        second = Node(far, recipe, folder, is_host=False)
        try:
            _wait_for(lambda: _reached(folder, ALONE_AT), "both nodes train")
            if cuts:
                far.cut()
            else:
                second.kill()
            (folder / "lost").touch()
            _wait_for(lambda: _reached(folder, BACK_AT), "the first node goes on alone")
            second.kill()
            far.mend()
            second = Node(far, recipe, folder, is_host=False)
            code = first.wait(START_SECONDS)
        finally:
            first.kill()
            second.kill()
    expected, found = steps_of(whole), steps_of(folder)
    worst = max(abs(found[s]["loss"] / expected[s]["loss"] - 1) for s in expected)
    ranks = [found[step]["ranks"] for step in sorted(found)]
    sys.stderr.write(f"{folder.name}: exit {code}, ranks {ranks}, losses differ by {worst:.1e}\n")
    is_same = worst < MOST_DIFFERENCE and packs_of(folder) == list(range(STEPS * BATCH))
    # The first steps are done again by one rank if they were not saved.
    return code == 0 and is_same and ranks[-1] == 2 and 1 in ranks


def _reached(folder: Path, step: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return int((folder / "reached").read_text() or 0) >= step
    return False


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < ends, f"not within {START_SECONDS:g} s: {what}"
        time.sleep(0.1)


class Link:
    """One end of a virtual cable, in a network namespace of its own."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def cut(self) -> None:
        """Let nothing through; neither end is told."""
        ip("-n", self.name, "link", "set", self.name, "down")

    def mend(self) -> None:
        """Let everything through again."""
        ip("-n", self.name, "link", "set", self.name, "up")


@contextlib.contextmanager
def cable() -> Iterator[tuple[Link, Link]]:
    """Two namespaces that are joined by a cable."""
    ends = [Link(f"vita{os.getpid()}{i}", f"10.77.0.{i + 1}") for i in range(2)]
    near, far = ends
    with contextlib.ExitStack() as stack:
        for link in ends:
            ip("netns", "add", link.name)
            stack.callback(ip, "netns", "del", link.name)
        ip("link", "add", near.name, "netns", near.name, "type", "veth",
           "peer", "name", far.name, "netns", far.name)  # fmt: skip
        for link in ends:
            ip("-n", link.name, "addr", "add", f"{link.address}/24", "dev", link.name)
            ip("-n", link.name, "link", "set", link.name, "up")
            ip("-n", link.name, "link", "set", "lo", "up")
        yield near, far


def ip(*arguments: str) -> None:
    """Run iproute2's command."""
    subprocess.run(["ip", *arguments], check=True)


class Node:
    """A launcher and its rank."""

    def __init__(self, link: Link, recipe: Path, folder: Path, *, is_host: bool) -> None:
        conf = f"{CONF},is_host={int(is_host)}"
        launcher = [
            sys.executable, "-m", "megatron_vita.launch", "--nnodes", "1:2",
            "--nproc-per-node", "1", "--max-restarts", "20", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", "faults", "--rdzv-conf", conf,
            "--local-addr", link.address,
        ]  # fmt: skip
        fields = [
            *SETTINGS, f"checkpoint.save={folder / 'checkpoints'}", "parallel.elastic=true",
            f"training.hang_seconds={HANG_SECONDS}",
            "training.callbacks=[{path: tests.faults.paced.PacedCallback, arguments: "
            f"{{folder: {folder}, alone_at: {ALONE_AT}, back_at: {BACK_AT}}}}}]",
        ]  # fmt: skip
        log = (folder / f"{link.name}.log").open("a")
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", link.name, *launcher, "pretrain_vita.py", str(recipe), *fields],
            cwd=ROOT,
            env=environment_with(GLOO_SOCKET_IFNAME=link.name, PYTHONWARNINGS="ignore"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None if it goes on."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill all of its processes at once, as a power failure does."""
        # Its number may be another process's by now.
        if self._process.poll() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self._process.wait()
