"""Memory that writing a checkpoint takes beside the run's own, in bytes for each parameter of a
rank.

    python benchmarks/saving_memory.py [--bucket-size N] [--replicated] [--layers N] [--hidden N]
        [--folder PATH]                                       alone, or by torchrun as N replicas

A language model in bf16, of 155 M parameters unless told otherwise. Prints a table: what a rank's
host memory grew by at the most, with the processes that write, the dry run's estimate of it, on
GPUs the device's, the seconds of a save that is waited for, and of one in the background: how long
training waited (with the optimizer's step after it), and until it was the latest checkpoint.
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
from megatron_vita.costs.memory.host_memory import saving_memory
from megatron_vita.parallel import groups
from megatron_vita.training.optimizer import optimizer
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.run.run_state import open_saver, restore, save_run, start_save


def language(layers: int, hidden: int) -> LanguageConfig:
    """Shapes of the model."""
    return LanguageConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=hidden // 64,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=16000,
    )


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


def open_run(folder: str, model: LanguageConfig, *, distributed: bool) -> Run:
    """Open a run with initial weights and an optimizer that has its state."""
    recipe = Recipe(
        model=ModelConfig(text_only=True, language=model),
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
    waited, done = save_in_background(run)
    ranks = dist.get_world_size()
    peaks: list[list[int]] = [[]] * ranks
    dist.all_gather_object(peaks, peak)
    count = sum(p.numel() for p in run.unwrapped_model.parameters())
    host, device = (max(each) / count for each in zip(*peaks, strict=True))
    estimate = saving_memory(run.recipe, 0, data_parallel=ranks) / count
    kind = "replicated"
    if run.recipe.parallel.use_distributed_optimizer:
        kind = "distributed"
    buckets = sum(len(buffer.buckets) for chunk in run.chunks for buffer in chunk.buffers)
    numbers = (
        f"{host:.1f} | {estimate:.1f} | {device:.1f} | {seconds:.1f} | {waited:.2f} | {done:.1f}"
    )
    return f"| {kind} | {ranks} | {buckets} | {numbers} |"


def save_in_background(run: Run) -> tuple[float, float]:
    """Save while the optimizer goes on; returns seconds waited, and until it is done.

    The checkpoint must hold the weights of before the step.
    """
    saver = open_saver(run.recipe, in_background=True)
    before = [p.detach().clone() for p in run.unwrapped_model.parameters()]
    platform.synchronize()
    start = time.perf_counter()
    run.step += 1
    start_save(run, saver)
    waited = time.perf_counter() - start
    run.optimizer.step()
    saver.finish()
    done = time.perf_counter() - start
    restore(run, ResumePoint.find(run.recipe))
    for p, expected in zip(run.unwrapped_model.parameters(), before, strict=True):
        assert torch.equal(p, expected), "the checkpoint holds later weights"
    return waited, done


def main() -> None:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket-size", type=float, default=optimizer.BUCKET_SIZE)
    parser.add_argument("--replicated", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--folder", help="on the disk to measure; a temporary one if not given")
    arguments = parser.parse_args()
    optimizer.BUCKET_SIZE = int(arguments.bucket_size)
    platform.initialize_process()
    folders = [tempfile.mkdtemp(dir=arguments.folder)]
    dist.broadcast_object_list(folders, src=0)
    model = language(arguments.layers, arguments.hidden)
    row = measure(open_run(folders[0], model, distributed=not arguments.replicated))
    if dist.get_rank() == 0:
        sys.stdout.write(
            "| optimizer | replicas | buckets | host | estimated | device | seconds | waited | done |\n"
            "|---|---|---|---|---|---|---|---|---|\n"
        )
        sys.stdout.write(f"{row}\n")
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
