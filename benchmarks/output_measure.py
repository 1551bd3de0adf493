"""Tables, sizes and measurements of the output layer's benchmark."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import OutputConfig, Recipe
from megatron_vita.model.build import transformer_config
from megatron_vita.model.output.output import OutputLayer
from megatron_vita.parallel import groups

GIB = 1 << 30
OUT_OF_MEMORY = "out of memory"


@dataclass
class Table:
    """Rows of text below a head."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Append a row and print it at once."""
        self.rows.append(
            [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            sys.stderr.write(" | ".join(self.rows[-1]) + "\n")

    def __str__(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return (
            f"\n## {self.title}\n\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in lines)
            + "\n"
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure; the small ones are for trying the script."""

    hidden: int
    vocab: int
    layers: int
    scale: int  # positions are divided by it
    seconds: float  # of measuring for a number
    prefill: tuple[int, ...] = (1, 4, 8, 32)  # times 8,192 tokens

    def positions(self, count: int) -> int:
        """`count`, or its small stand-in."""
        return count // self.scale


FULL_SIZE = Sizes(hidden=5120, vocab=152_064, layers=48, scale=1, seconds=1.5)
TINY = Sizes(hidden=64, vocab=1000, layers=2, scale=1024, seconds=0.01)


@dataclass
class Problem:
    """A hidden state [t, H], scored rows and their labels; `every_label` [t] has -100 elsewhere."""

    hidden: Tensor
    rows: Tensor  # on the host, as are labels
    labels: Tensor
    every_label: Tensor


def make_problem(sizes: Sizes, *, positions: int, rows: int) -> Problem:
    """Random, the same on every rank; hidden states have the size that a final norm gives them."""
    generator = torch.Generator().manual_seed(0)
    device = platform.device()
    chosen = torch.randperm(positions, generator=generator)[:rows].sort().values
    labels = torch.randint(0, sizes.vocab, (rows,), generator=generator)
    every = torch.full((positions,), -100).index_copy(0, chosen, labels).to(device)
    state = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(positions, sizes.hidden, device=device, dtype=torch.bfloat16)
    for part in hidden.split(1 << 16):
        part.copy_(torch.randn(part.shape, device=device, generator=state))
    return Problem(hidden.requires_grad_(), chosen, labels, every)


def make_layer(sizes: Sizes, **options: Any) -> OutputLayer:
    """An output layer of the groups that exist."""
    recipe = Recipe().replaced(
        {
            "training.bf16": True,
            "parallel.tensor_model_parallel_size": groups.rank_layout().tp_size,
            "parallel.sequence_parallel": options.pop("sequence_parallel", False),
            "model.language.hidden_size": sizes.hidden,
        }
    )
    config = transformer_config(recipe, fused=False)
    config.perform_initialization = False
    layer = OutputLayer(
        config, vocab_size=sizes.vocab, options=OutputConfig(**options), owns_weight=True
    )
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
    return layer


def free() -> None:
    """Release unused GPU memory."""
    gc.collect()
    if platform.on_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], Any]) -> float:
    """Measure one call's time on the device."""
    if not platform.on_cuda():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(
    call: Callable[[], Any], *, reset: Callable[[], None], seconds: float
) -> tuple[float, float] | None:
    """Median seconds of at least 3 calls, and peak GiB above the start; None if memory runs out."""
    free()
    try:
        reset()
        call()  # compiles, and makes the libraries' workspaces
        reset()
        free()
        before = torch.cuda.memory_allocated() if platform.on_cuda() else 0
        if platform.on_cuda():
            torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() if platform.on_cuda() else 0
        times: list[float] = []
        several = dist.get_world_size() > 1  # ranks must make as many calls as one another
        while len(times) < (10 if several else 3) or (
            not several and sum(times) < seconds and len(times) < 20
        ):
            reset()
            times.append(seconds_of(call))
        return statistics.median(times), (peak - before) / GIB
    except torch.OutOfMemoryError:
        return None
    finally:
        reset()
        free()


def row_of(result: tuple[float, float] | None) -> list[object]:
    """Format milliseconds and GiB, or that memory ran out."""
    if result is None:
        return [OUT_OF_MEMORY, ""]
    return [result[0] * 1000, result[1]]
