"""A server on a free port of this machine, in a thread."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_vita.inference.server.app import ServerOptions
from megatron_vita.inference.server.server import VitaServer
from megatron_vita.inference.server.service.interface import ServedEngine

MODEL = "toy"


@dataclass
class RunningServer:
    engine: Any
    server: VitaServer
    client: httpx.Client
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def chat(self, content: Any = "hello", **fields: Any) -> httpx.Response:
        """One question."""
        return self.client.post("/v1/chat/completions", json=body(content, **fields))

    def error(self, content: Any = "hello", *, status: int, **fields: Any) -> dict[str, Any]:
        """The error of a question that is refused with this status."""
        return refusal(self.chat(content, **fields), status)


def body(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in a response, which must have OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.01)


@contextmanager
def running(engine: ServedEngine, **options: Any) -> Iterator[RunningServer]:
    """Starts a server and stops it in order."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = VitaServer(
            engine, ServerOptions(model_name=MODEL, **options), host="127.0.0.1", port=port
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            wait_until(lambda: server.started, 30)
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False
            ) as client:
                yield RunningServer(engine, server, client, port)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
