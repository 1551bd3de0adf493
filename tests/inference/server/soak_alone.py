"""Memory that a server keeps after many requests: soak_alone.py {fake,tiny} REQUESTS writes it as
JSON.

It runs in a process of its own, since the allocator's arenas of a process that did something else
before grow in steps of many megabytes, at any time.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import sys
import tempfile
import tracemalloc
from pathlib import Path

import psutil

from megatron_vita import platform
from megatron_vita.inference.server.service.interface import ServedEngine
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import RunningServer, running, wait_until
from tests.inference.server.soak import KINDS, soak
from tests.inference.tiny import tiny_engine

_C = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remains:
    """Memory and objects left after so many requests."""

    kilobytes: float
    """Growth of Python's memory."""
    megabytes: float
    """Growth of the process: from the least of three rounds to the least of the next three."""
    health: dict[str, object]
    """Last metrics of the server."""


def remains(server: RunningServer, *, requests: int) -> Remains:
    assert not soak(server, requests=5 * len(KINDS))
    rounds = [_resident_after(server, requests=requests // 3) for _ in range(6)]
    tracemalloc.start()  # a pass of its own: its tables are as large as what it watches
    before = tracemalloc.get_traced_memory()[0]
    assert not soak(server, requests=requests)
    _settle(server)
    traced = tracemalloc.get_traced_memory()[0] - before
    return Remains(
        kilobytes=traced / 1e3,
        megabytes=(min(rounds[3:]) - min(rounds[:3])) / 1e6,
        health=server.client.get("/health").json(),
    )


def _resident_after(server: RunningServer, *, requests: int) -> int:
    """Bytes of the process after so many requests, without what the C library could give back."""
    assert not soak(server, requests=requests)
    _settle(server)
    _C.malloc_trim(0)
    return psutil.Process().memory_info().rss


def _settle(server: RunningServer) -> None:
    """Waits until all requests have ended, and makes some last ones, which take the place of what
    was said last."""
    wait_until(lambda: server.client.get("/health").json()["open_requests"] == 0)
    for _ in range(10):
        server.chat(max_tokens=1)
    wait_until(lambda: server.client.get("/health").json()["running"] == 0)
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["fake", "tiny"])
    parser.add_argument("requests", type=int)
    arguments = parser.parse_args()
    # the clients' threads would keep some tens of megabytes more or less for their next long
    # prompts
    assert _C.mallopt(_M_MMAP_THRESHOLD, 1 << 16), "the C library takes no thresholds"
    with tempfile.TemporaryDirectory() as folder:
        platform.initialize_process()
        engine: ServedEngine = (
            FakeEngine() if arguments.engine == "fake" else tiny_engine(Path(folder))
        )
        with running(engine) as server:
            result = remains(server, requests=arguments.requests)
    sys.stdout.write(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
