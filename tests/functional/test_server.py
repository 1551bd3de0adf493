"""The server as a command: on one process and on two, to an orderly end and to the loss of a
rank."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_vita import platform
from megatron_vita.config import load_recipe
from megatron_vita.training.loop import train
from tests.environment import environment_with
from tests.forked import run_program, start_program
from tests.functional.toy_run import make_toy_run
from tests.inference.server.running_server import refusal, wait_until
from tests.ports import free_port


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    path = make_toy_run(folder, samples=30)
    platform.initialize_process()
    train(
        load_recipe(
            path, ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=2"]
        )
    )
    return folder / "checkpoints"


@dataclass
class Service:
    ranks: list[subprocess.Popen[str]]
    client: httpx.Client

    def ask(self, **fields: object) -> httpx.Response:
        asked = {
            "model": "toy",
            "messages": [{"role": "user", "content": "say red"}],
            "temperature": 0,
            **fields,
        }
        return self.client.post("/v1/chat/completions", json=asked)

    def logs_of(self, rank: int) -> str:
        """Log of a rank, up to its end."""
        return self.ranks[rank].communicate(timeout=60)[1]


@contextmanager
def service(checkpoints: Path, *, ranks: int, arguments: tuple[str, ...] = ()) -> Iterator[Service]:
    """Start the server command on so many processes one by one: no launcher looks after them."""
    port = free_port()
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["-m", "megatron_vita.inference.server", str(checkpoints), "--model-name", "toy"]
    command += ["--port", str(port), *arguments]
    processes = [
        start_program(
            *command,
            env=environment_with()
            | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
        try:
            wait_until(lambda: is_up(client, processes), 200)
            yield Service(processes, client)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def is_up(client: httpx.Client, processes: list[subprocess.Popen[str]]) -> bool:
    for process in processes:
        assert process.poll() is None, process.stderr and process.stderr.read()
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.alone
def test_one_process_answers_with_its_limits_and_ends_with_0_at_sigterm(checkpoints: Path) -> None:
    with service(
        checkpoints, ranks=1, arguments=("--output-tokens", "5", "--max-context", "100")
    ) as served:
        answer = served.ask(ignore_eos=True).json()
        assert answer["usage"]["completion_tokens"] == 5
        long = [{"role": "user", "content": "word " * 100}]
        assert "--prompt-tokens" in refusal(served.ask(messages=long), 400)["message"]
        assert_ends_at_once_with_its_children(served.ranks[0])


def assert_ends_at_once_with_its_children(server: subprocess.Popen[str]) -> None:
    """Assert that a process is gone within 3 seconds after its last log line, with all its
    children."""
    children = psutil.Process(server.pid).children(recursive=True)
    assert children
    server.send_signal(signal.SIGTERM)
    assert server.stderr is not None
    assert any("the server has stopped" in line for line in server.stderr)
    assert server.wait(timeout=3) == 0
    assert psutil.wait_procs(children, timeout=1)[1] == []


def test_what_cannot_be_served_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    ended = run_program("-m", "megatron_vita.inference.server", str(tmp_path))
    assert ended.returncode == 1
    assert str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_two_ranks_answer_as_one_and_the_first_ends_the_other(checkpoints: Path) -> None:
    with service(checkpoints, ranks=1) as served:
        alone = served.ask(max_tokens=12, ignore_eos=True).json()["choices"]
    with service(checkpoints, ranks=2) as served:
        assert served.ask(max_tokens=12, ignore_eos=True).json()["choices"] == alone
        for process in reversed(served.ranks):  # as a launcher does, which tells all
            process.send_signal(signal.SIGTERM)
        assert "the server has stopped" in served.logs_of(0)
        served.logs_of(1)
        assert [process.returncode for process in served.ranks] == [0, 0]


def test_a_rank_that_dies_ends_the_service_with_a_reason(checkpoints: Path) -> None:
    with service(checkpoints, ranks=2, arguments=("--tensor-model-parallel-size", "2")) as served:
        assert served.ask(max_tokens=3).status_code == 200
        served.ranks[1].kill()
        with suppress(httpx.TransportError):  # it may have noticed, and ended
            assert "a rank is gone" in refusal(served.ask(), 503)["message"]
        log = served.logs_of(0)
        assert "the server ends because the engine failed: EngineError" in log
        assert served.ranks[0].returncode == 1
