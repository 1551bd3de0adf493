"""Options and markers of the whole suite."""

import os

import pytest

from tests import scale

# One thread per process, so that numbers do not depend on the machine's load or size.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case and every size")


def pytest_configure(config: pytest.Config) -> None:
    scale.choose_full(config.getoption("full"))


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
