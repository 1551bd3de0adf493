"""The process of a server: its exit status and last words."""

import signal
import subprocess
import time
from pathlib import Path

import httpx

from tests.forked import start_program
from tests.inference.server.clients import LONG, in_thread
from tests.inference.server.running_server import body, refusal, wait_until
from tests.ports import free_port

FOLDER = Path(__file__).parent


def start_process(*arguments: str) -> tuple[subprocess.Popen[str], httpx.Client]:
    """A server process with the engine of the tests, when it listens."""
    port = free_port()
    script = str(FOLDER / "serve_fake.py")
    process = start_program(script, str(port), *arguments, stderr=subprocess.PIPE)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)

    def listens() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(listens, 120)
    return process, client


def test_the_process_ends_with_1_and_a_reason_when_the_engine_fails() -> None:
    process, client = start_process("--fails-after", "5")
    assert (
        "rank 1 is gone"
        in refusal(client.post("/v1/chat/completions", json=body(LONG)), 503)["message"]
    )
    _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the server ends because the engine failed: RuntimeError: rank 1 is gone" in log


def test_the_process_ends_with_1_where_its_engine_does_not_end() -> None:
    process, client = start_process("--step-seconds", "100")
    answers = in_thread(lambda: client.post("/v1/chat/completions", json=body()))
    wait_until(lambda: client.get("/health").json()["step_seconds"] > 0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)  # whoever says it twice does not want to wait
    assert refusal(answers()[0], 503)["code"] == "stopping"
    _, log = process.communicate(timeout=5)
    assert process.returncode == 1, log
    assert "the server ends before its engine" in log


def test_a_second_sigint_cuts_answers_off_and_ends_an_engine_that_can_end() -> None:
    process, client = start_process("--step-seconds", "0.05")
    answers = in_thread(lambda: client.post("/v1/chat/completions", json=body(LONG)))
    wait_until(lambda: client.get("/health").json()["running"] == 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert refusal(answers()[0], 503)["code"] == "stopping"
    _, log = process.communicate(timeout=5)
    assert process.returncode == 0, log


def test_the_process_finishes_its_answers_and_ends_with_0_at_sigterm() -> None:
    process, client = start_process("--step-seconds", "0.02")
    answers = in_thread(lambda: client.post("/v1/chat/completions", json=body("w" * 50)))
    wait_until(lambda: client.get("/health").json()["running"] == 1)
    process.send_signal(signal.SIGTERM)
    assert answers()[0].json()["choices"][0]["message"]["content"] == "w" * 50
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert "the server has stopped" in log
