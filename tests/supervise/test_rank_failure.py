"""The end of ranks under torchrun, and what is printed of it. The ranks import no torch."""

import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_vita import launch
from megatron_vita.errors import ConfigError
from megatron_vita.supervise.last_words import read_last_words
from megatron_vita.supervise.rank_failure import describe_failure, describe_restart
from tests.environment import ROOT

BEGINNING = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_vita.errors import ConfigError
from megatron_vita.supervise.rank_failure import note_checkpoints, report_failure

rank = int(os.environ["RANK"])
here = Path(__file__).parent
note_checkpoints(str(here / "checkpoints"))
try:
"""
USER = '    raise ConfigError("optimizer.lr is abc: float is needed")'
ONE_RANK = """
    while rank == 0 and not (here / "raised").exists():
        time.sleep(0.01)
    if rank == 0:
        time.sleep(0.2)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1")
    (here / "raised").touch()
    raise ConfigError("shard 7 is damaged")
"""
KILLED = """
    while rank == 1 and not (here / "ready").exists():
        time.sleep(0.01)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (here / "ready").touch()
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1")
"""
AT_WORK = """
    import logging
    from megatron_vita.supervise.last_words import keep_last_words, open_state_file
    logging.basicConfig(force=True, level=logging.WARNING, format="%(levelname)s %(message)s")
    keep_last_words()
    state = open_state_file()
    if rank == 0:
        time.sleep(60)
    for step, phase in ((100, "optimizer"), (8, "loading")):
        os.pwrite(state, json.dumps({"step": step, "phase": phase}).encode() + b"\\n", 0)
    logging.warning("a longer line: 3 samples cannot be read")
    logging.warning("shard 7 is\\nslow")
    child = os.fork()
    if not child:
        logging.warning("a line of a child")
        os.kill(os.getpid(), signal.SIGABRT)
    os.waitpid(child, 0)
    def in_native_code():
        os.kill(os.getpid(), signal.SIGNAL)
    in_native_code()
"""
STOPPED = """
    def save(number, frame):
        with (here / f"told_{rank}").open("a") as told:
            told.write(signal.Signals(number).name + " ")
        time.sleep(SECONDS)
        raise ConfigError("told to stop: saved")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    (here / f"ready_{rank}").touch()
    time.sleep(60)
"""
ENDING = """
except (Exception, KeyboardInterrupt) as error:
    sys.exit(report_failure(error, checkpoints=str(here / "checkpoints")))
"""


class Ended(NamedTuple):
    """A launcher's exit code, and the lines that it and its ranks printed."""

    code: int
    lines: list[str]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    numbers = (*launch.FORWARDED, signal.SIGHUP, signal.SIGQUIT)
    before = [(number, signal.getsignal(number)) for number in numbers]
    # The launcher signals the children of its process, which is a test's here: others, such as the
    # server of forks, are not its ranks.
    children = psutil.Process.children
    others = set(psutil.Process().children())
    monkeypatch.setattr(
        psutil.Process,
        "children",
        lambda self, **of: [child for child in children(self, **of) if child not in others],
    )
    yield
    for number, handler in before:  # torchrun sets its own
        signal.signal(number, handler)


def arguments(folder: Path, body: str) -> list[str]:
    """Launcher arguments for two ranks that run `body`, in a run that stands at step 20."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "latest").write_text("step_00000020")
    script = folder / "worker.py"
    script.write_text(BEGINNING + body + ENDING)
    return ["--standalone", "--nproc_per_node", "2", str(script)]


@contextmanager
def launchers_log() -> Iterator[list[str]]:
    """Lines that the launcher itself logs, which pytest takes from stderr."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    launch.logger.addHandler(handler)
    try:
        yield said
    finally:
        launch.logger.removeHandler(handler)


def start(folder: Path, body: str, capfd: pytest.CaptureFixture[str]) -> Ended:
    capfd.readouterr()
    with launchers_log() as said:
        code = launch.main(arguments(folder, body))
    return Ended(code, [*capfd.readouterr().err.splitlines(), *said])


def test_a_users_error_is_one_line_of_one_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, USER, capfd) == (1, ["optimizer.lr is abc: float is needed"])


def test_torchruns_own_report_ends_with_the_same_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ChildFailedError) as caught:
        run.run(run.parse_args(arguments(tmp_path, USER)))
    # one that it had to end, late in coming so far, is no failure of its own
    assert sum(failure.exitcode > 0 for failure in caught.value.failures.values()) == 1
    report = str(caught.value).splitlines()
    assert report[-2] == "  traceback : optimizer.lr is abc: float is needed"


def test_ranks_that_lose_the_one_that_failed_say_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, ONE_RANK, capfd) == (1, ["shard 7 is damaged"])


def test_a_rank_that_is_killed_is_named_with_where_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = start(tmp_path, KILLED, capfd)
    resumes = f"the same command resumes from {tmp_path}/checkpoints/step_00000020"
    assert ended.code == 128 + signal.SIGKILL
    assert ended.lines[-1] == (
        f"rank 1 was killed by SIGKILL (often for lack of host memory); {resumes}"
    )
    (survivor,) = ended.lines[:-1]
    assert survivor.startswith("rank 0: another rank has died, which the launcher names: [gloo")
    assert survivor.endswith(resumes)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"SIGKILL \(often for lack of host memory\) in step 8, loading; "),
        (signal.SIGSEGV, r"SIGSEGV in step 8, loading at in_native_code \(.*/worker.py:\d+\); "),
        (signal.SIGTERM, "SIGTERM in step 8, loading; "),
    ],
)
def test_a_rank_that_dies_is_named_with_its_place_and_last_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, said: str
) -> None:
    ended = start(tmp_path, AT_WORK.replace("signal.SIGNAL", f"signal.{number.name}"), capfd)
    assert ended.code == 128 + number
    line = (
        rf"rank 1 was killed by {said}its last line: \S+ WARNING shard 7 is slow; the same command"
    )
    assert re.match(line, ended.lines[-1])


def test_a_rank_that_kept_no_words_has_none(tmp_path: Path) -> None:
    assert read_last_words(tmp_path, local_rank=0) == ""
    folder = tmp_path / "id" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    assert read_last_words(tmp_path, local_rank=0) == ""
    (folder / "state").write_text("not JSON")
    assert read_last_words(tmp_path, local_rank=0) == ""
    (folder / "state").write_text(json.dumps({"step": 0, "phase": "starting"}) + "\n")
    (folder / "last_line").write_text("x" * 1000)
    said = read_last_words(tmp_path, local_rank=0)
    assert said == f" before its first step; its last line: {'x' * 300}"


def test_an_interrupt_of_all_ranks_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = start(tmp_path, "    raise KeyboardInterrupt", capfd)
    assert ended.code == 128 + signal.SIGINT
    assert [line.partition(": ")[2] for line in ended.lines] == [
        f"interrupted; the same command resumes from {tmp_path}/checkpoints/step_00000020"
    ]


def signal_launcher(folder: Path, *sent: signal.Signals) -> threading.Thread:
    """Send signals to this process, the first when both ranks wait for it, each next when both
    have got the one before."""

    def wait_for(name: str) -> bool:
        ends = time.monotonic() + 60
        while len(list(folder.glob(f"{name}_*"))) < 2:
            if time.monotonic() > ends:
                return False
            time.sleep(0.02)
        return True

    def send() -> None:
        # Without ranks nobody handles a signal, which would end the tests.
        if not wait_for("ready"):
            return
        for place, number in enumerate(sent):
            if place:
                if not wait_for("told"):
                    return
                time.sleep(2 * launch.REPEAT_SECONDS)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_the_launcher_waits_until_its_ranks_have_saved(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    close = SubprocessContext._close
    # torchrun's patience with ranks that it ends, shorter than these take
    monkeypatch.setattr(
        SubprocessContext, "_close", lambda self, death_sig, timeout: close(self, death_sig, 0)
    )
    sender = signal_launcher(tmp_path, number)
    ended = start(tmp_path, STOPPED.replace("SECONDS", "0.5"), capfd)
    sender.join()
    assert ended == (128 + number, ["told to stop: saved"])
    for rank in (0, 1):
        assert (tmp_path / f"told_{rank}").read_text() == f"{number.name} "


def test_a_second_interrupt_of_the_launcher_stops_its_ranks_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sender = signal_launcher(tmp_path, signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    ended = start(tmp_path, STOPPED.replace("SECONDS", "600"), capfd)
    sender.join()
    assert time.monotonic() - began < 120
    assert ended.code == 128 + signal.SIGINT
    assert ended.lines == [
        "interrupted again: stopped at once, without saving; the same command resumes from "
        f"{tmp_path}/checkpoints/step_00000020"
    ]


def test_a_bug_shows_its_traceback_once_and_ends_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = start(tmp_path, '    raise ValueError("no\\nsuch thing")', capfd)
    assert sum(line.startswith("Traceback") for line in ended.lines) == 1
    assert "ValueError: no such thing; the same command resumes from" in ended.lines[-1]


def test_where_a_run_starts_again_is_said(tmp_path: Path) -> None:
    assert "checkpoint.save is empty" in describe_restart("")
    assert f"{tmp_path} has no checkpoint" in describe_restart(str(tmp_path))
    assert describe_failure(ConfigError("a\n  b"), checkpoints="runs") == "a b"
