"""Run on two ranks: creates the groups of two layouts in turn and counts this process's threads.

Argument: file for the number of threads after each change of layout, from the first rank.
"""

import json
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import ParallelConfig
from megatron_vita.parallel import groups

CHANGES = 8


def main() -> None:
    """Change the layout, use a group of each, and count."""
    platform.initialize_process()
    threads = []
    for change in range(CHANGES):
        groups.initialize_groups(ParallelConfig(tensor_model_parallel_size=1 + change % 2))
        total = torch.ones(1)
        dist.all_reduce(total, group=groups.tensor_group())
        assert total.item() == 1 + change % 2
        threads.append(psutil.Process().num_threads())
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(threads))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
