"""Process groups that are replaced are gone: a process may go through any number of layouts."""

import json
from pathlib import Path

import pytest

from tests.functional.launch import ON_GPUS, torchrun


@pytest.mark.skipif(ON_GPUS, reason="counts threads of gloo groups")
def test_changes_of_layout_start_no_threads_that_stay(tmp_path: Path) -> None:
    file = tmp_path / "threads.json"
    torchrun("groups_worker.py", str(file), processes=2)
    threads = json.loads(file.read_text())
    assert threads[-2:] == threads[2:4]  # of the same layouts, after one and after three rounds
