"""Timed steps of a training benchmark's case, for any implementation, and their summary."""

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from training_cases import Case
from training_results import stamp, write_result

from megatron_vita import platform
from megatron_vita.costs.flops import training_flops

GIB = 1 << 30
OUT_OF_MEMORY = 3
NOT_EMPTY = 4
"""Exit codes of a process that ran out of memory, and of one whose last case has left too much there."""
LEFT_OVER = GIB // 2


class StepResult(NamedTuple):
    """Report of one step."""

    loss: float
    grad_norm: float


class PackContent(NamedTuple):
    """Content of a case's packs, which are all alike."""

    lengths: list[int]  # of documents
    tiles: int
    rows: int  # that are scored


class Measurement:
    """The result of a case, written after each step."""

    def __init__(self, case: Case, out: Path, content: PackContent, **known: Any) -> None:
        self.case = case
        self.out = out
        self.seconds: list[float] = []
        self.result = describe(case, content) | known | {"status": "running"}
        self.write()

    def write(self, **found: Any) -> None:
        """Write the result so far, with new fields, on one rank."""
        self.result |= found
        if dist.get_rank() == 0:
            write_result(self.out, self.result)

    def note_static_memory(self) -> None:
        """Record the memory allocated before the first step."""
        self.write(static_gib=round(most(_allocated()) / GIB, 2))

    def run(
        self, step: Callable[[], StepResult], *, warm_up: Callable[[], StepResult] | None = None
    ) -> None:
        """Run all steps of the case; warm-up steps are `step` too if nothing else is given."""
        for _ in range(self.case.warm_up):
            self._time(warm_up or step)
        for _ in range(self.case.steps):
            self._time(step)

    def _time(self, step: Callable[[], StepResult]) -> None:
        """Run one step, timed from and to a barrier of all ranks."""
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        found = step()
        torch.cuda.synchronize()
        self.seconds.append(most(time.perf_counter() - start))
        self.write(**self._totals(), **found._asdict())
        if dist.get_rank() == 0:
            print(  # noqa: T201
                f"{self.case.name} step {len(self.seconds)}: {self.seconds[-1]:.3f} s, loss {found.loss:.4f}, "
                f"gradient norm {found.grad_norm:.4f}, peak {self.result['peak_gib']:.1f} GiB",
                flush=True,
            )

    def _totals(self) -> dict[str, Any]:
        """Rates from the median after warm-up, or of all steps; memory of the fullest rank."""
        step = statistics.median(self.seconds[self.case.warm_up :] or self.seconds)
        tokens = self.case.tokens * self.case.packs * self.case.dp
        peak, reserved = _peaks()
        host = round(_sum(_host_bytes()) / GIB, 2)
        return {
            "steps": [round(seconds, 4) for seconds in self.seconds],
            "step_seconds": round(step, 4),
            "tokens_per_second_per_gpu": round(tokens / step / self.case.gpus, 1),
            "tflops_per_gpu": round(self.result["step_flops"] / step / self.case.gpus / 1e12, 2),
            "peak_gib": round(most(peak) / GIB, 2),
            "reserved_gib": round(most(reserved) / GIB, 2),
            "host_gib": max(self.result.get("host_gib", 0.0), host),
        }


def describe(case: Case, content: PackContent) -> dict[str, Any]:
    """Description of a case before it runs."""
    packs = case.packs * case.dp
    flops = training_flops(
        case.recipe(), content.lengths, tiles=content.tiles, loss_tokens=content.rows
    )
    model = case.model
    if case.layers:
        model = f"{model}, {case.layers} layers"
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name() if platform.on_cuda() else "CPU",
        "gpus": case.gpus,
        "tokens": case.tokens,
        "documents": case.documents,
        "packs": packs,
        "tiles": content.tiles,
        "scored_rows": content.rows,
        "model": model,
        "layout": case.layout,
        "backend": case.peer or case.backend,
        "levers": case.levers,
        "step_flops": flops.total * packs,
        **stamp(),
        "options": asdict(case),
        "torch": torch.__version__,
    }


def _allocated() -> int:
    if platform.on_cuda():
        return torch.cuda.memory_allocated()
    return 0


def _peaks() -> tuple[int, int]:
    if not platform.on_cuda():
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _host_bytes() -> int:
    """Current host memory of this process, including pinned buffers."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def most(value: float) -> float:
    """The largest of all ranks' values. Collective."""
    return _over_ranks(value, dist.ReduceOp.MAX)


def _sum(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.SUM)


def _over_ranks(value: float, op: Any) -> float:
    whole = torch.tensor(value, dtype=torch.float64, device=platform.device())
    dist.all_reduce(whole, op=op)
    return whole.item()


def is_out_of_memory(error: BaseException) -> bool:
    """True if a library's error says, in whatever words, that the device is out of memory."""
    words = str(error).lower()
    known = ("out of memory", "alloc_failed", "cuda_error_out_of_memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in words for word in known)


def _leave_out_of_memory(out: Path, error: BaseException) -> None:
    """Record the error beside the result and end this process; torchrun then ends the waiting
    others."""
    rank = dist.get_rank()
    peak = _peaks()[0] / GIB
    message = f"rank {rank}, peak {peak:.1f} GiB: {str(error).splitlines()[0]}"
    out.with_suffix(".oom").write_text(message)
    os._exit(OUT_OF_MEMORY)


def _clear() -> None:
    """Free what the last case has left; end the process, so that fresh ones are started, if that is
    not enough. Collective."""
    gc.collect()
    if not platform.on_cuda():
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if most(_allocated()) > LEFT_OVER:
        sys.exit(NOT_EMPTY)


def _limit_memory(gib: int) -> None:
    """Let this process use no more of its device's memory; 0: all of it."""
    if platform.on_cuda():
        total = torch.cuda.get_device_properties(platform.device()).total_memory
        share = min(1.0, gib * GIB / total) if gib else 1.0
        torch.cuda.set_per_process_memory_fraction(share)


def work_through(measure: Callable[[Case, Path], Any]) -> None:
    """Measure the cases named on the command line: a JSON file of cases, and the folder for their
    results. Started by torchrun."""
    cases = [Case(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    for case in cases:
        _clear()
        _limit_memory(case.device_gib)
        out = Path(sys.argv[2]) / f"{case.name}.json"
        try:
            measure(case, out)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _leave_out_of_memory(out, error)
    platform.destroy_process_group()
