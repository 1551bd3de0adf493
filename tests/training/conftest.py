"""The toy run that tests of training train."""

from pathlib import Path

import pytest

from megatron_vita import platform
from tests.functional.toy_run import make_toy_run


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its data, in a folder of the test file's own."""
    platform.initialize_process()
    return make_toy_run(tmp_path_factory.mktemp("toy"))
