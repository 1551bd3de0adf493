"""Nothing piles up: many requests of all kinds are answered or refused as they should be, and memory is flat."""

import gc

import psutil
from fake_engine import FakeEngine
from running_server import running, wait_until
from soak import KINDS, soak

REQUESTS = 1000
MEGABYTES = 60
OBJECTS = 2000


def held() -> tuple[float, int]:
    """Megabytes of this process, and Python's objects."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6, len(gc.get_objects())


def test_1000_mixed_requests_end_as_they_should_and_leave_nothing() -> None:
    with running(FakeEngine()) as server:
        assert not soak(server, requests=20 * len(KINDS))
        memory, objects = held()
        assert not soak(server, requests=REQUESTS)
        wait_until(lambda: server.client.get("/health").json()["open_requests"] == 0)
        wait_until(lambda: not server.engine.requests)
        more_memory, more_objects = held()
        assert more_memory - memory < MEGABYTES
        assert more_objects - objects < OBJECTS
        assert server.client.get("/health").json()["status"] == "ok"
