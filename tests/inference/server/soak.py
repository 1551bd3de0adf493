"""Many requests of all kinds at once against a running server, whatever its engine."""

import itertools
import json
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.inference.server.media_makers import bomb, data_url, image, png, video
from tests.inference.server.running_server import RunningServer, body
from tests.inference.server.webm import webm

JSON = {"content-type": "application/json"}
FILM = data_url(webm(seconds=1), "video/webm")

Kind = tuple[str, Callable[[httpx.Client, int], int], int]
"""Its name, what sends it and gives the status, and the status that is right."""


def _ask(content: object, **fields: object) -> Callable[[httpx.Client, int], int]:
    """A question that is a little different each time."""

    def send(client: httpx.Client, number: int) -> int:
        asked = content if content is not None else f"question {number} of many"
        return client.post(
            "/v1/chat/completions", json=body(asked, max_tokens=4, **fields)
        ).status_code

    return send


def _raw(data: bytes) -> Callable[[httpx.Client, int], int]:
    return lambda client, _: (
        client.post("/v1/chat/completions", content=data, headers=JSON).status_code
    )


def _stream(client: httpx.Client, number: int) -> int:
    asked = body(f"stream {number}", max_tokens=4, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")
        return response.status_code


def _leave_early(client: httpx.Client, number: int) -> int:
    asked = body(f"cancel {number} " * 5, max_tokens=50, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        next(response.iter_lines())
        return response.status_code


def _hang_up(client: httpx.Client, number: int) -> int:
    """Goes away without waiting for anything."""
    data = json.dumps(body(f"hang up {number}", max_tokens=50)).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
    return 0


KINDS: list[Kind] = [
    ("text", _ask(None), 200),
    ("stream", _stream, 200),
    ("image", _ask(image(data_url(png()))), 200),
    ("cancel", _leave_early, 200),
    ("log-probabilities", _ask(None, logprobs=True, top_logprobs=3, n=2, temperature=0.7), 200),
    ("video", _ask(video(FILM), max_frames=2), 200),
    ("hang up", _hang_up, 0),
    ("unknown field", _ask(None, colour="red"), 400),
    ("no JSON", _raw(b"{"), 400),
    ("NaN", _raw(json.dumps(body()).encode()[:-1] + b', "temperature": NaN}'), 400),
    ("deep", _raw(b"[" * 10_000), 400),
    ("no image", _ask(image(data_url(b"text"))), 400),
    ("bomb", _ask(image(data_url(bomb()))), 400),
    ("path", _ask(image("../../etc/passwd")), 400),
    ("remote", _ask(image("http://169.254.169.254/latest")), 400),
    ("other model", _ask(None, model="other"), 404),
    ("too long", _ask("a" * 9_000_000), 400),
]
"""With the default limits of the server, its body limit apart, and remote media off."""


def soak(server: RunningServer, *, requests: int, clients: int = 8) -> Counter[str]:
    """Sends `requests` of all kinds, `clients` at a time. Counts by kind those that ended as they
    should not."""
    kinds = list(itertools.islice(itertools.cycle(KINDS), requests))
    wrong: Counter[str] = Counter()
    with (
        ThreadPoolExecutor(clients) as pool,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client,
    ):
        statuses = pool.map(lambda each: each[1][1](client, each[0]), enumerate(kinds))
        for (name, _, right), status in zip(kinds, statuses, strict=True):
            if status != right:
                wrong[f"{name}: {status}"] += 1
    return wrong
