"""Nothing piles up: many requests of all kinds are answered or refused as they should be, and
memory is flat."""

import json
from pathlib import Path

import pytest

from tests.forked import run_program
from tests.inference.server.soak import KINDS
from tests.scale import scaled

SCRIPT = Path(__file__).with_name("soak_alone.py")
KILOBYTES = 1000
"""What Python may hold more after many requests: caches that fill, and no trace of a request."""
MEGABYTES = 5
"""The same of the whole process."""


@pytest.mark.parametrize(
    ("engine", "requests"),
    [
        ("fake", scaled(20 * len(KINDS), full=1000)),
        ("tiny", scaled(10 * len(KINDS), full=1000)),
    ],
)
def test_mixed_requests_end_as_they_should_and_leave_nothing(engine: str, requests: int) -> None:
    ended = run_program(str(SCRIPT), engine, str(requests))
    assert ended.returncode == 0, ended.stderr
    remains = json.loads(ended.stdout)
    assert remains["kilobytes"] < KILOBYTES
    assert remains["megabytes"] < MEGABYTES
    health = remains["health"]
    assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)
