"""A process that has imported what ranks need, and forks them: imports cost more than most tests.

Reads jobs from stdin, one JSON object a line, runs one at a time, and answers with a line that has
its exit code. A job is a launcher process and its ranks, as torchrun would start them.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PRELOADED = (
    "data_tools.cli",
    "megatron.core.dist_checkpointing",
    "megatron_vita.convert.importing",
    "megatron_vita.data",
    "megatron_vita.inference.engine.engine",
    "megatron_vita.training.loop",
)
SECONDS_TO_STOP = 10
"""Time between SIGTERM and SIGKILL for ranks that outlive a failed one."""


def main() -> None:
    """Run jobs until stdin closes."""
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_launch(job))
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(code, flush=True)  # noqa: T201


def _launch(job: dict[str, Any]) -> int:
    """Fork the ranks of a job, pass SIGTERM on to them, and end all when one fails.

    Returns the exit code of the rank that failed first, 128 + n for signal n.
    """
    _redirect(job["out"], job["err"])
    ranks = [_start_rank(job, rank) for rank in range(job["processes"])]
    signal.signal(signal.SIGTERM, lambda *_: _send(ranks, signal.SIGTERM))
    failed = 0
    kill_at = float("inf")
    while ranks:
        time.sleep(0.01)
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            ranks.remove(pid)
            if status and not failed:
                code = os.waitstatus_to_exitcode(status)
                failed = code if code > 0 else 128 - code
                kill_at = time.monotonic() + SECONDS_TO_STOP
                _send(ranks, signal.SIGTERM)
        if time.monotonic() > kill_at:
            _send(ranks, signal.SIGKILL)
    return failed


def _send(ranks: list[int], number: signal.Signals) -> None:
    for pid in ranks:
        os.kill(pid, number)


def _redirect(out: str, err: str) -> None:
    """Send stdout and stderr to files, and give stdin to nobody."""
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _start_rank(job: dict[str, Any], rank: int) -> int:
    """Fork one rank with torchrun's variables; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    world = str(job["processes"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    # The store lives in the process that asked: no port is given up before a rank binds it.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "rank_server"}
    os._exit(_run_script(job["script"], job["arguments"]))


def _run_script(script: str, arguments: list[str]) -> int:
    """Run a script as `__main__`; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = _exit_code(ended)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _exit_code(ended: SystemExit) -> int:
    """The exit code that the interpreter gives a SystemExit; a message goes to stderr."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    main()
