"""Cases of the training benchmark, one after another in the processes that torchrun starts for them.

Arguments: a JSON file of the cases, and the folder for their results, which are written again after
each step. Started by training.py.
"""

import gc
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packs import dealt_to_this_rank, make_pack
from training_cases import Case
from training_profile import profile_step
from training_results import stamp, write_result

from megatron_vita import platform
from megatron_vita.costs.flops import pack_flops
from megatron_vita.costs.memory import GIB, PackLoad, rank_memory
from megatron_vita.data.batch import Batch
from megatron_vita.parallel import groups
from megatron_vita.training.metrics import StepMetrics
from megatron_vita.training.run import Run, assemble_run
from megatron_vita.training.step import train_step

OUT_OF_MEMORY, NOT_EMPTY = 3, 4
"""Exit codes of a process that ran out of memory, and of one whose last case has left too much there."""
LEFT_OVER = GIB // 2


class Measurement:
    """Timed steps of a case, and what they come to."""

    def __init__(self, case: Case, out: Path) -> None:
        self.case, self.out = case, out
        self.seconds: list[float] = []
        recipe = case.recipe()
        groups.initialize_groups(recipe.parallel)
        self.pack = make_pack(recipe, documents=case.documents, seed=1)
        self.batch = dealt_to_this_rank(self.pack)
        self.result = describe(case, self.pack) | {"status": "running"}
        self.write()
        self.run: Run = assemble_run(recipe)
        self.result["backend"] = self.run.cores[0].language_model.backend.name
        self.result["static_gib"] = round(_most(_allocated()) / GIB, 2)
        self.write()

    def write(self) -> None:
        """Writes the result so far, on one rank."""
        if dist.get_rank() == 0:
            write_result(self.out, self.result)

    def step(self) -> None:
        """One step, timed while all ranks are in step; the result takes it in."""
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        metrics = train_step(self.run, iter([self.batch] * self.case.packs))
        torch.cuda.synchronize()
        self.seconds.append(_most(time.perf_counter() - start))
        self.result |= self.totals(metrics)
        self.write()
        if dist.get_rank() == 0:
            print(  # noqa: T201
                f"{self.case.name} step {len(self.seconds)}: {self.seconds[-1]:.3f} s, loss {metrics.loss:.4f}, "
                f"gradient norm {metrics.grad_norm:.4f}, peak {self.result['peak_gib']:.1f} GiB",
                flush=True,
            )

    def totals(self, metrics: StepMetrics) -> dict[str, Any]:
        """Rates from the median after warm-up, or of what there is; memory of the fullest rank."""
        counted = self.seconds[self.case.warm_up :] or self.seconds
        step = statistics.median(counted)
        tokens = self.case.tokens * self.case.packs * self.case.dp
        flops = self.result["step_flops"]
        peak, reserved = _peaks()
        return {
            "steps": [round(seconds, 4) for seconds in self.seconds],
            "step_seconds": round(step, 4),
            "tokens_per_second_per_gpu": round(tokens / step / self.case.gpus, 1),
            "tflops_per_gpu": round(flops / step / self.case.gpus / 1e12, 2),
            "peak_gib": round(_most(peak) / GIB, 2),
            "reserved_gib": round(_most(reserved) / GIB, 2),
            "host_gib": max(self.result.get("host_gib", 0.0), round(_sum(_host_bytes()) / GIB, 2)),
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
        }


def describe(case: Case, pack: Batch) -> dict[str, Any]:
    """What is known of a case before it runs."""
    recipe = case.recipe()
    lengths, rows = pack.document_starts.diff().tolist(), int((pack.labels != -100).sum())
    load = PackLoad(tiles=len(pack.tiles), rows=rows, lengths=tuple(lengths))
    flops = 3 * pack_flops(recipe, lengths, tiles=load.tiles, rows=load.rows)
    stages = range(case.pp)
    estimated = [rank_memory(recipe, s, data_parallel=case.dp, load=load).peak for s in stages]
    cuda = platform.on_cuda()
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "gpus": case.gpus,
        "tokens": case.tokens,
        "documents": case.documents,
        "packs": case.packs * case.dp,
        "tiles": load.tiles,
        "scored_rows": load.rows,
        "model": case.model + (f", {case.layers} layers" if case.layers else ""),
        "layout": case.layout,
        "backend": case.backend,
        "levers": case.levers,
        "step_flops": flops * case.packs * case.dp,
        "estimated_gib": round(max(estimated) / GIB, 2),
        **stamp(),
        "options": asdict(case),
        "torch": torch.__version__,
    }


def _allocated() -> int:
    return torch.cuda.memory_allocated() if platform.on_cuda() else 0


def _peaks() -> tuple[int, int]:
    if not platform.on_cuda():
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _host_bytes() -> int:
    """Memory of the host that this process has now, with what it has pinned."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _most(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.MAX)


def _sum(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.SUM)


def _over_ranks(value: float, op: Any) -> float:
    whole = torch.tensor(value, dtype=torch.float64, device=platform.device())
    dist.all_reduce(whole, op=op)
    return whole.item()


def measure(case: Case, out: Path) -> dict[str, Any]:
    """Runs a case in the process group that exists, and returns its result. Collective."""
    measurement = Measurement(case, out)
    for _ in range(case.warm_up + case.steps):
        measurement.step()
    if case.profile:
        batches = [measurement.batch] * case.packs
        measurement.result["profile"] = profile_step(
            lambda: train_step(measurement.run, iter(batches))
        )
    measurement.result["status"] = "complete"
    measurement.write()
    return measurement.result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library had no memory on the device, in whatever words it says so."""
    words = str(error).lower()
    known = ("out of memory", "alloc_failed", "cuda_error_out_of_memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in words for word in known)


def leave_out_of_memory(out: Path, error: BaseException) -> None:
    """Notes the error beside the result and ends this process; torchrun then ends the others, which
    wait for it."""
    rank, peak = dist.get_rank(), _peaks()[0] / GIB
    message = f"rank {rank}, peak {peak:.1f} GiB: {str(error).splitlines()[0]}"
    out.with_suffix(".oom").write_text(message)
    os._exit(OUT_OF_MEMORY)


def clear() -> None:
    """Gives back what the last case has left; ends the process, for fresh ones to be started, if that is
    not enough. Collective."""
    gc.collect()
    if not platform.on_cuda():
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if _most(_allocated()) > LEFT_OVER:
        sys.exit(NOT_EMPTY)


def main() -> None:
    """Measures the cases of the first argument."""
    cases = [Case(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    for case in cases:
        clear()
        out = Path(sys.argv[2]) / f"{case.name}.json"
        try:
            measure(case, out)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            leave_out_of_memory(out, error)
    platform.leave_process()


if __name__ == "__main__":
    main()
