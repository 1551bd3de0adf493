"""A server on loopback that speaks as much of the chat completions protocol as the tests need."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class APIError(Exception):
    """Raised by a reply to make the server answer with a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class FakeChatServer(ThreadingHTTPServer):
    """Answers with `reply(request)`, word by word where it streams; keeps requests and keys."""

    daemon_threads = True

    def __init__(
        self, reply: Callable[[dict[str, Any]], str], *, seconds_a_word: float = 0.0
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.seconds_a_word = seconds_a_word
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.left_early = threading.Event()
        self.most_at_once = self.now = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving(reply: Callable[[dict[str, Any]], str], **options: Any) -> Iterator[FakeChatServer]:
    """A running server."""
    server = FakeChatServer(reply, **options)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def texts_of(request: dict[str, Any]) -> list[str]:
    """Texts of a request, message by message."""
    contents = [message["content"] for message in request["messages"]]
    return [c if isinstance(c, str) else "".join(p.get("text", "") for p in c) for c in contents]


class _Handler(BaseHTTPRequestHandler):
    server: FakeChatServer

    def log_message(self, *arguments: Any) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.keys.add(self.headers.get("Authorization"))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        try:
            text = server.reply(request)
            if request.get("stream"):
                self._stream(text, request)
            else:
                usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self._json(
                    200,
                    {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage},
                )
        except APIError as refusal:
            self._json(refusal.status, {"error": {"message": str(refusal)}})
        finally:
            with server.lock:
                server.now -= 1

    def _stream(self, text: str, request: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for word in text.split(" "):
                for index in range(request.get("n") or 1):
                    delta = {"content": word + " "}
                    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
                    if request.get("logprobs"):
                        token = {"token": word, "logprob": -0.5, "bytes": None}
                        choice["logprobs"] = {"content": [token | {"top_logprobs": [token]}]}
                    chunk = {"id": "1", "object": "chat.completion.chunk", "choices": [choice]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
                time.sleep(self.server.seconds_a_word)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left_early.set()

    def _json(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
