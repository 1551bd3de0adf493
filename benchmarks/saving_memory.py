"""Memory that writing a checkpoint takes beside the run's own, in bytes for each parameter of a
rank.

    python benchmarks/saving_memory.py [--bucket-size N] [--replicated]      alone, or by torchrun
    as N replicas

A language model of 155 M parameters in bf16. Prints a table: what a rank's host memory grew by at
the most, with the processes that write, the dry run's estimate of it, and on GPUs the device's.
"""

import argparse
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import (
    CheckpointConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
)
from megatron_vita.costs.host_memory import saving_memory
from megatron_vita.parallel import groups
from megatron_vita.training import optimizer
from megatron_vita.training.run import Run, assemble_run, save_run

LANGUAGE = LanguageConfig(
    num_layers=8, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=4, kv_channels=64,
    vocab_size=16000,
)  # fmt: skip


def resident() -> int:
    """Resident bytes of this process and its children, each shared page counted once."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_full_info().uss
        except psutil.Error:  # it has ended
            continue
    return total


@contextmanager
def watched(peak: list[int]) -> Iterator[None]:
    """Add the largest growth of host and device memory to `peak`, in bytes."""
    gc.collect()
    before = resident()
    most = [0]
    over = threading.Event()
    on_device = torch.cuda.is_available()

    def watch() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], resident() - before)

    thread = threading.Thread(target=watch)
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated() if on_device else 0
    thread.start()
    yield
    over.set()
    thread.join()
    peak += [most[0], torch.cuda.max_memory_allocated() - allocated if on_device else 0]


def open_run(folder: str, *, distributed: bool) -> Run:
    """Open a run with initial weights and an optimizer that has its state."""
    recipe = Recipe(
        model=ModelConfig(text_only=True, language=LANGUAGE),
        training=TrainingConfig(bf16=True, global_batch_size=dist.get_world_size()),
        parallel=ParallelConfig(use_distributed_optimizer=distributed),
        checkpoint=CheckpointConfig(save=folder),
    )
    groups.initialize_groups(recipe.parallel)
    run = assemble_run(recipe)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    for parameter in run.unwrapped_model.parameters():
        parameter.main_grad.fill_(1e-3)
    run.optimizer.step()
    return run


def measure(run: Run) -> str:
    """Save the run; returns the row of the table."""
    peak: list[int] = []
    start = time.perf_counter()
    with watched(peak):
        save_run(run)
    seconds = time.perf_counter() - start
    ranks = dist.get_world_size()
    peaks: list[list[int]] = [[]] * ranks
    dist.all_gather_object(peaks, peak)
    count = sum(p.numel() for p in run.unwrapped_model.parameters())
    host, device = (max(each) / count for each in zip(*peaks, strict=True))
    estimate = saving_memory(run.recipe, 0, data_parallel=ranks) / count
    kind = "distributed" if run.recipe.parallel.use_distributed_optimizer else "replicated"
    buckets = sum(len(buffer.buckets) for chunk in run.chunks for buffer in chunk.buffers)
    return f"| {kind} | {ranks} | {buckets} | {host:.1f} | {estimate:.1f} | {device:.1f} | {seconds:.1f} |"


def main() -> None:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket-size", type=float, default=optimizer.BUCKET_SIZE)
    parser.add_argument("--replicated", action="store_true")
    arguments = parser.parse_args()
    optimizer.BUCKET_SIZE = int(arguments.bucket_size)
    platform.initialize_process()
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders, src=0)
    row = measure(open_run(folders[0], distributed=not arguments.replicated))
    if dist.get_rank() == 0:
        sys.stdout.write(
            "| optimizer | replicas | buckets | host | estimated | device | seconds |\n|---|---|---|---|---|---|---|\n"
        )
        sys.stdout.write(f"{row}\n")
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
