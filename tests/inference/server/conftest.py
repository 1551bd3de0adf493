"""A server with an engine that repeats what it is asked."""

from collections.abc import Iterator

import pytest

from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import RunningServer, running


@pytest.fixture(scope="module")
def echo() -> Iterator[RunningServer]:
    with running(FakeEngine()) as server:
        yield server
