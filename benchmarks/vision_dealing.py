"""Vision dealing: tiles shared by all ranks of a replica, against every rank encoding all of them.

    torchrun --nproc_per_node 2 benchmarks/vision_dealing.py [--out FILE.json] [--scale tiny]

Qwen2.5-7B's shape with InternViT-300M, random weights, packs of 32K tokens of which 60 % are image
tokens. Prints a table: time of a step, of vision in forward and backward, of the exchange of feature
rows, bytes sent, and memory beside what `costs/` estimated. On four GPUs: TP2 x CP2 and hierarchical
CP.
`--scale tiny` runs it anywhere, for a look.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_shapes import QWEN2_7B, TINY, TINY_TOWER
from packs import dealt_to_this_rank, make_pack

from megatron_vita import platform
from megatron_vita.config import (
    DataConfig,
    DatasetConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
)
from megatron_vita.costs.flops import pack_flops
from megatron_vita.costs.memory.memory import GIB, PackLoad, rank_memory
from megatron_vita.data.batch import Batch
from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import collectives, groups
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.step.step import train_step

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP = {"context_parallel_size": 2}
WARM_UP = 2
STEPS = 5
DOCUMENTS = 4


def layouts(world: int) -> dict[str, dict]:
    """Layouts that fill `world` ranks."""
    if world == 2:
        return {"TP2+SP": TP} | {
            f"CP2 {kind}": CP | {"cp_comm_type": kind} for kind in ("p2p", "all_gather", "a2a")
        }
    hierarchy = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}
    return {"TP2+SP x CP2": TP | CP, "CP4 a2a+p2p": {"context_parallel_size": 4} | hierarchy}


def make_recipe(parallel: dict, *, tiny: bool) -> Recipe:
    """The benchmark's recipe, or one that a laptop can run."""
    model = ModelConfig(language=LanguageConfig(**QWEN2_7B))
    if tiny:
        model = ModelConfig(vision=VisionConfig(**TINY_TOWER), language=LanguageConfig(**TINY))
    return Recipe(
        model=model,
        data=DataConfig(seq_length=2048 if tiny else 32768, train=[DatasetConfig(name="random", shards="none")]),
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(
            global_batch_size=1, bf16=not tiny, recompute_granularity="full", recompute_vision=True
        ),
    )  # fmt: skip


class Clock:
    """Time between pairs of marks on the device, summed by name over a step."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any, Any]] = []
        self.open: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Begin an interval."""
        self.open[name] = _event()

    def stop(self, name: str) -> None:
        """End it."""
        if name in self.open:
            self.marks.append((name, self.open.pop(name), _event()))

    def read(self) -> dict[str, float]:
        """Return the seconds by name, and reset them."""
        sums: dict[str, float] = {}
        for name, first, last in self.marks:
            seconds = first.elapsed_time(last) / 1000 if platform.on_cuda() else last - first
            sums[name] = sums.get(name, 0.0) + seconds
        self.marks = []
        return sums


def _event() -> Any:
    if not platform.on_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def watch_vision(model: VitaModel, clock: Clock) -> None:
    """Mark vision's forward pass, and its backward pass from the projector's output to the tower's
    embeddings."""
    encode = model.encode

    def timed(tiles: torch.Tensor) -> torch.Tensor:
        clock.start("vision forward")
        features = encode(tiles)
        clock.stop("vision forward")
        if features.requires_grad:
            features.register_hook(lambda _: clock.start("vision backward"))
        return features

    model.encode = timed  # type: ignore[method-assign]
    last = model.vision_model.embeddings.patch_embedding.weight
    last.register_hook(lambda _: clock.stop("vision backward"))


@contextmanager
def watched_exchange(clock: Clock, sent: list[int]) -> Iterator[None]:
    """Mark each exchange of feature rows, and count the bytes that leave this rank."""
    exchange = collectives._all_to_all

    def timed(rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        clock.start("exchange")
        received = exchange(rows, send, receive, group)
        clock.stop("exchange")
        away = sum(send) - send[group.rank()]
        sent.append(away * rows[0].numel() * rows.element_size() if len(rows) else 0)
        return received

    collectives._all_to_all = timed
    try:
        yield
    finally:
        collectives._all_to_all = exchange


def duplicate_vision(model: VitaModel, pack: Batch) -> None:
    """Let every rank encode all tiles and keep only its assigned ones: the work that dealing saves."""
    layout = groups.rank_layout()
    assigned = assign_tiles(pack.frames, layout.tile_ranks)[layout.tile_rank]
    encode = model.encode
    model.encode = lambda tiles: encode(tiles)[assigned.to(tiles.device)]  # type: ignore[method-assign]


def measure(parallel: dict, *, duplicated: bool, tiny: bool) -> dict[str, float]:
    """Medians over steps, each of the slowest rank."""
    recipe = make_recipe(parallel, tiny=tiny)
    groups.initialize_groups(recipe.parallel)
    if platform.on_cuda():
        torch.cuda.reset_peak_memory_stats()
    run = assemble_run(recipe)
    pack = make_pack(recipe, documents=DOCUMENTS, seed=1)
    clock = Clock()
    sent = []
    watch_vision(run.unwrapped_model, clock)
    if duplicated:
        duplicate_vision(run.unwrapped_model, pack)
    batch = pack
    if not duplicated:
        batch = dealt_to_this_rank(pack)
    steps = []
    with watched_exchange(clock, sent):
        for _ in range(WARM_UP + STEPS):
            sent.clear()
            steps.append(_timed_step(run, batch, clock))
    names = ("step", "vision forward", "vision backward", "exchange")
    result = {name: statistics.median(step[name] for step in steps[WARM_UP:]) for name in names}
    result |= {
        "vision": result["vision forward"] + result["vision backward"],
        "sent": float(sum(sent)),
    }
    result["tiles"] = float(len(batch.tiles))
    result["peak"] = float(torch.cuda.max_memory_allocated()) if platform.on_cuda() else 0.0
    result = _slowest(result)
    load = PackLoad(tiles=len(pack.tiles), loss_tokens=int((pack.labels != IGNORED_LABEL).sum()))
    result["estimated"] = float(rank_memory(recipe, 0, data_parallel=1, load=load).peak)
    flops = 3 * pack_flops(
        recipe, pack.cu_seqlens.diff().tolist(), tiles=load.tiles, loss_tokens=load.loss_tokens
    )
    result["TFLOP/s"] = flops / result["step"] / dist.get_world_size() / 1e12
    result["tokens/s"] = recipe.data.seq_length / result["step"] / dist.get_world_size()
    return result


def _timed_step(run: Run, batch: Batch, clock: Clock) -> dict[str, float]:
    torch.cuda.synchronize()
    dist.barrier()
    clock.start("step")
    train_step(run, iter([batch]))
    clock.stop("step")
    torch.cuda.synchronize()
    return clock.read()


def _slowest(result: dict[str, float]) -> dict[str, float]:
    values = torch.tensor(list(result.values()), dtype=torch.float64, device=platform.device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(result, values.tolist(), strict=True))


COLUMNS: dict[str, Callable[[dict[str, float]], str]] = {
    "step, s": lambda r: f"{r['step']:.3f}",
    "tokens/s/GPU": lambda r: f"{r['tokens/s']:,.0f}",
    "model TFLOP/s/GPU": lambda r: f"{r['TFLOP/s']:.0f}",
    "tiles a rank": lambda r: f"{r['tiles']:.0f}",
    "vision forward, ms": lambda r: f"{1000 * r['vision forward']:.1f}",
    "vision backward, ms": lambda r: f"{1000 * r['vision backward']:.1f}",
    "exchange, ms": lambda r: f"{1000 * r['exchange']:.2f}",
    "exchange / step": lambda r: f"{r['exchange'] / r['step']:.2%}",
    "sent a rank, MB": lambda r: f"{r['sent'] / 1e6:.1f}",
    "peak, GiB": lambda r: f"{r['peak'] / GIB:.1f}",
    "estimated, GiB": lambda r: f"{r['estimated'] / GIB:.1f}",
}


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown table, with the ratio of vision times."""
    lines = ["| layout | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(show(r) for show in COLUMNS.values()) + " |"
        for name, r in results.items()
    ]
    for name, result in results.items():
        if (other := results.get(f"{name}, duplicated")) is not None:
            lines.append(
                f"\n{name}: vision time assigned / duplicated {result['vision'] / other['vision']:.3f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure every layout with assigned tiles, and the first two also duplicated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    arguments = parser.parse_args()
    platform.initialize_process()
    results: dict[str, dict[str, float]] = {}
    chosen = layouts(dist.get_world_size())
    for i, (name, parallel) in enumerate(chosen.items()):
        # Duplicated towers are measured at the first two layouts alone.
        kinds = [False]
        if i < 2:
            kinds.append(True)
        for duplicated in kinds:
            key = name
            if duplicated:
                key = f"{name}, duplicated"
            results[key] = measure(parallel, duplicated=duplicated, tiny=arguments.scale == "tiny")
            gc.collect()
            torch.cuda.empty_cache()
            if dist.get_rank() == 0 and arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1))
    if dist.get_rank() == 0:
        print(table(results), flush=True)  # noqa: T201
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
