"""Many requests of all kinds at once against a running server, whatever its engine."""

import ctypes
import gc
import itertools
import json
import logging
import socket
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
from media_makers import bomb, data_url, image, png, video
from running_server import RunningServer, body, wait_until
from webm import webm

JSON = {"content-type": "application/json"}
FILM = data_url(webm(seconds=1), "video/webm")

Kind = tuple[str, Callable[[httpx.Client, int], int], int]
"""Its name, what sends it and gives the status, and the status that is right."""


def _ask(content: object, **fields: object) -> Callable[[httpx.Client, int], int]:
    """A question that is a little different each time."""

    def send(client: httpx.Client, number: int) -> int:
        asked = content if content is not None else f"question {number} of many"
        return client.post("/v1/chat/completions", json=body(asked, max_tokens=4, **fields)).status_code

    return send


def _raw(data: bytes) -> Callable[[httpx.Client, int], int]:
    return lambda client, _: client.post("/v1/chat/completions", content=data, headers=JSON).status_code


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
    """Sends `requests` of all kinds, `clients` at a time. Counts by kind those that ended as they should not."""
    kinds = list(itertools.islice(itertools.cycle(KINDS), requests))
    wrong: Counter[str] = Counter()
    with ThreadPoolExecutor(clients) as pool, httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        statuses = pool.map(lambda each: each[1][1](client, each[0]), enumerate(kinds))
        for (name, _, right), status in zip(kinds, statuses, strict=True):
            if status != right:
                wrong[f"{name}: {status}"] += 1
    return wrong


KILOBYTES = 2000
"""What Python may hold more after many requests: caches that fill, and no trace of a request."""
MEGABYTES = 20
"""The same of the whole process."""
_C = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3


def growth(server: RunningServer, *, requests: int) -> tuple[float, float]:
    """Kilobytes of Python's, and megabytes of the process, that so many requests leave behind.

    The latter lies between the least of three rounds and the least of the next three. The C library, which would keep
    some tens of megabytes more or less for each thread's next blocks, gives back each large one from now on.
    """
    assert _C.mallopt(_M_MMAP_THRESHOLD, 1 << 16), "the C library takes no thresholds"
    assert not soak(server, requests=5 * len(KINDS))
    rounds = [_resident_after(server, requests=requests // 3) for _ in range(6)]
    level = logging.root.level
    logging.root.setLevel(logging.WARNING)  # pytest keeps all records of a test, and others may have asked for more
    tracemalloc.start()  # a pass of its own: its tables are as large as what it watches
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert not soak(server, requests=requests)
        _settle(server)
        traced = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        logging.root.setLevel(level)
    return traced / 1e3, (min(rounds[3:]) - min(rounds[:3])) / 1e6


def _resident_after(server: RunningServer, *, requests: int) -> int:
    """Bytes of the process after so many requests, without what the C library could give back."""
    assert not soak(server, requests=requests)
    _settle(server)
    _C.malloc_trim(0)
    return psutil.Process().memory_info().rss


def _settle(server: RunningServer) -> None:
    """Waits until all requests have ended, and makes some last ones, which take the place of what was said last."""
    wait_until(lambda: server.client.get("/health").json()["open_requests"] == 0)
    for _ in range(10):
        server.chat(max_tokens=1)
    gc.collect()
