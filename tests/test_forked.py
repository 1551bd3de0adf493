"""Forked programs end, fail and are killed as started ones are, and nothing of them stays."""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.forked import ON_GPUS, run_program, start_program

pytestmark = pytest.mark.skipif(ON_GPUS, reason="programs are started anew there")


def test_a_program_has_its_arguments_streams_folder_and_environment(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ); sys.exit('no')"
    ended = run_program("-c", code, "a b", cwd=tmp_path, env={"MINE": "1"})
    assert ended.returncode == 1
    assert ended.stdout == f"['-c', 'a b'] {tmp_path} environ({{'MINE': '1'}})\n"
    assert ended.stderr == "no\n"


def test_each_program_begins_with_the_modules_of_the_server_alone() -> None:
    code = "import sys, torch; print('torch.mine' in vars(torch)); setattr(torch, 'torch.mine', 1)"
    assert [run_program("-c", code).stdout for _ in range(2)] == ["False\n"] * 2


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import threading; threading.Thread(target=lambda: print('thread')).start()", 0),
        ("import atexit; atexit.register(print, 'thread')", 0),
    ],
)
def test_the_end_of_a_program_is_that_of_a_started_one(code: str, expected: int) -> None:
    ended = run_program("-c", code)
    assert ended.returncode == expected
    assert ended.stdout == ("thread\n" if "thread" in code else "")


def test_a_killed_program_leaves_no_server_of_multiprocessing() -> None:
    code = (
        "import multiprocessing, time; context = multiprocessing.get_context('forkserver');"
        "process = context.Process(target=print, args=('from a process',)); process.start();"
        "process.join(); print(process.exitcode, flush=True); time.sleep(100)"
    )
    with start_program("-c", code, stdout=subprocess.PIPE) as program:
        assert program.stdout
        assert [program.stdout.readline() for _ in range(2)] == ["from a process\n", "0\n"]
        children = psutil.Process(program.pid).children(recursive=True)
        assert len(children) == 2  # the server of forks and the tracker of resources
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.01)
        program.kill()
        assert program.wait(10) == -signal.SIGKILL
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_programs_end_with_the_process_that_asked_for_them() -> None:
    code = (
        "import os, signal; from tests import forked; forked.PRELOADED = ();"
        "print(forked.start_program('-c', 'import time; time.sleep(100)').pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = run_program("-c", code)
    assert ended.returncode == -signal.SIGKILL
    pid = int(ended.stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(10)
    assert not psutil.pid_exists(pid)


def test_the_server_imports_the_compiler_for_optimizers_and_no_writers_of_metrics() -> None:
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(run_program("-c", code).stdout))
    assert modules >= {"megatron_vita.training.loop", "torch._dynamo"}
    assert modules.isdisjoint({"tensorboard", "wandb"})
