"""A server with an engine that repeats what it is asked."""

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from running_server import RunningServer, running


@pytest.fixture(scope="module")
def echo() -> Iterator[RunningServer]:
    with running(FakeEngine()) as server:
        yield server
