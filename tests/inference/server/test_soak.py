"""Nothing piles up: many requests of all kinds are answered or refused as they should be, and memory is flat."""

from fake_engine import FakeEngine
from running_server import running, wait_until
from soak import KILOBYTES, MEGABYTES, growth

REQUESTS = 1000


def test_1000_mixed_requests_end_as_they_should_and_leave_nothing() -> None:
    with running(FakeEngine()) as server:
        kilobytes, megabytes = growth(server, requests=REQUESTS)
        assert kilobytes < KILOBYTES
        assert megabytes < MEGABYTES
        wait_until(lambda: not server.engine.requests)
        assert server.client.get("/health").json()["status"] == "ok"
