"""Options and markers of the whole suite."""

import fcntl
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import once, scale

GATE = Path(scale.__file__)

# One thread per process, so that numbers do not depend on the machine's load or size.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case and every size")


def pytest_configure(config: pytest.Config) -> None:
    scale.choose_full(config.getoption("full"))
    config.add_cleanup(once.open_folder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and skip those marked `full` unless `--full` is given."""
    for item in items:
        folders = item.path.parts
        if "functional" in folders:
            item.add_marker(pytest.mark.distributed)
        if "gpu" in folders:
            item.add_marker(pytest.mark.gpu)
        full = item.get_closest_marker("full")
        if full and not config.getoption("full"):
            item.add_marker(pytest.mark.skip(reason=f"{full.args[0]}: --full"))


def pytest_collection_finish() -> None:
    """Leave out of later garbage collections what stays: modules and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_scheduling() -> Iterator[None]:
    """Fail a test that leaves its process with another priority, which later ones would have."""
    before = os.sched_getscheduler(0)
    yield
    after = os.sched_getscheduler(0)
    if after != before:
        os.sched_setscheduler(0, before, os.sched_param(0))
    assert after == before, f"the scheduling policy is {after}, and was {before} before"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test that is marked `alone` while no other process runs one of this folder."""
    alone = item.get_closest_marker("alone") is not None
    with GATE.open() as gate, Path(__file__).open() as lock:
        fcntl.flock(gate, fcntl.LOCK_EX)  # whoever waits to be alone lets nobody else in
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:  # not by closing the files: a forked process may have them, too
            fcntl.flock(lock, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_UN)
