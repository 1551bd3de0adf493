"""Process groups that are replaced are gone: a process may go through any number of layouts."""

import json
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_vita.config import ParallelConfig
from megatron_vita.parallel import groups
from tests.functional.launch import ON_GPUS, run_ranks, torchrun

CHANGES = 8


def count_threads(file: Path) -> None:
    """Change the layout, use a group of each, and count this process's threads after each."""
    threads = []
    for change in range(CHANGES):
        groups.initialize_groups(ParallelConfig(tensor_model_parallel_size=1 + change % 2))
        total = torch.ones(1)
        dist.all_reduce(total, group=groups.tensor_group())
        assert total.item() == 1 + change % 2
        threads.append(psutil.Process().num_threads())
    if dist.get_rank() == 0:
        file.write_text(json.dumps(threads))


@pytest.mark.skipif(ON_GPUS, reason="counts threads of gloo groups")
def test_changes_of_layout_start_no_threads_that_stay(tmp_path: Path) -> None:
    file = tmp_path / "threads.json"
    run_ranks(count_threads, 2, file)
    threads = json.loads(file.read_text())
    assert threads[-2:] == threads[2:4]  # of the same layouts, after one and after three rounds


def test_ranks_wait_for_the_first_one_longer_than_a_collective_may_take() -> None:
    torchrun("slow_first_worker.py", processes=2)
