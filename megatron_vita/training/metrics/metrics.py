"""Metrics of a step, over all ranks."""

import re
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any, SupportsFloat, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.costs.flops import training_flops
from megatron_vita.costs.memory.memory import GIB
from megatron_vita.data.batch import Batch
from megatron_vita.errors import ConfigError
from megatron_vita.layout.slicing import IGNORED_LABEL, PackSlice
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import to_device
from megatron_vita.training.metrics.meter import Meter, Reduce, as_vector

DATA_SECONDS = "speed/data_seconds"
SAVING = "saving"
SUMS = (
    "tokens",
    "positions",
    "tiles",
    "loss_tokens",
    "documents",
    "damaged",
    "stand_ins",
    "flops",
    "vision_flops",
)
PREFERENCES = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)
"""Means over the pairs of a step, by the names that TRL gives them."""
OWN_PARTS = ("train", "validation", "speed", "data", "memory", "callbacks")
OWN_NAMES = ("event", "step", "time")
_NAME = re.compile(r"[A-Za-z0-9_.: -]+(/[A-Za-z0-9_.: -]+)*")


@dataclass(kw_only=True)
class StepMetrics:
    """Sums of one step over all replicas and derived values; the same on every rank."""

    step: int
    loss: float  # per loss token, or per pair of answers
    loss_tokens: int
    # per dataset, as `loss`; datasets without any are left out
    source_losses: dict[str, float]
    tokens: int  # without padding
    tiles: int
    fill: float  # tokens / positions
    documents: int
    damaged: int  # documents that could not be read as they are
    seconds: float
    flops: float = 0.0  # model FLOPs, see costs/flops.py
    vision_flops: float = 0.0  # of these, of tower and projector
    stand_ins: int = 0  # frames that are shown by others because they are damaged
    ranks: int = 1
    matmul_rate: float = 0.0  # FLOP/s of large matrix products on one rank's device; 0: unknown
    stops: bool = False  # some rank was told to stop
    failed: bool = False  # a callback has failed on some rank
    saving: bool = False  # some rank was still writing a checkpoint as the step began
    held_out: bool = False  # of a validation
    grad_norm: float = 0.0
    skipped: bool = False  # a rule of `numerics` has skipped the step: no weight was updated
    lr: float = 0.0
    rolls_back: bool = False  # a rule takes the step back, and others before it
    preferences: dict[str, float] = field(default_factory=dict)  # of pairs, see PREFERENCES
    # everything else that was added to the meter, by name
    values: dict[str, float] = field(default_factory=dict)
    # metrics of `Run.record` since the last step that was logged, by name
    recorded: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the global batch per second, without padding."""
        return self.tokens / self.seconds

    @property
    def tiles_per_second(self) -> float:
        """Tiles and frames of the global batch per second."""
        return self.tiles / self.seconds

    @property
    def tflops_per_gpu(self) -> float:
        """Causal model TFLOP/s of a rank, without recomputation and padding of packs."""
        return self.flops / self.seconds / self.ranks / 1e12

    def scalars(self) -> dict[str, float]:
        """Return all metrics by name, as TensorBoard shows them; for a validation the losses
        alone."""
        part = "validation" if self.held_out else "train"
        losses = {f"{part}/loss": self.loss}
        losses |= {f"{part}/loss/{source}": loss for source, loss in self.source_losses.items()}
        losses |= {f"{part}/{name}": value for name, value in self.preferences.items()}
        if self.held_out:
            return losses
        scalars = {
            "train/grad_norm": self.grad_norm,
            "train/lr": self.lr,
            "speed/step_seconds": self.seconds,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/tokens_per_second_per_gpu": self.tokens_per_second / self.ranks,
            "speed/tiles_per_second": self.tiles_per_second,
            "speed/tflops_per_gpu": self.tflops_per_gpu,
            "speed/vision_share": self.vision_flops / max(self.flops, 1),
            "data/loss_tokens": self.loss_tokens,
            "data/fill": self.fill,
            "data/damaged": self.damaged,
            "data/repeated_frames": self.stand_ins,
        }
        if self.skipped:
            scalars["train/skipped"] = 1.0
        if self.matmul_rate:
            scalars["speed/matmul_share"] = self.tflops_per_gpu * 1e12 / self.matmul_rate
        return losses | scalars | self.values | self.recorded


@cache
def check_name(name: str) -> None:
    """Check the name of a metric that is not the loop's own.

    Raises:
        ConfigError: it belongs to the loop, or writers of metrics would not take it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"metric {name!r}: a name has letters, digits and any of _ . : - in parts between single slashes"
        )
    if name.split("/")[0] in (*OWN_PARTS, *OWN_NAMES):
        raise ConfigError(
            f"metric {name!r}: names that are or begin with {', '.join((*OWN_PARTS, *OWN_NAMES))} are the loop's own; "
            f"record it as mine/{name}"
        )


def check_record(meter: Meter, name: str, value: Any, *, reduce: Reduce) -> None:
    """Check what a user adds to `meter`.

    Raises:
        ConfigError: the name is the loop's own, or the value or the reduction cannot be.
    """
    check_name(name)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ConfigError(
                f"metric {name!r} is a tensor of shape {list(value.shape)}: one number is needed"
            )
    elif not isinstance(value, SupportsFloat):
        raise ConfigError(f"metric {name!r} is {value!r}: a number or a tensor is needed")
    known = meter.reduce_of(name) or reduce
    if reduce not in get_args(Reduce):
        raise ConfigError(
            f"metric {name!r}: reduce is {reduce!r}; known: {', '.join(get_args(Reduce))}"
        )
    if reduce != known:
        raise ConfigError(f"metric {name!r} is reduced by {known} elsewhere, by {reduce} here")


class LossSums:
    """Sums of losses by source in one step and what they are summed over: loss tokens of this
    rank's slices, or pairs of answers."""

    def __init__(self, sources: list[str]) -> None:
        self.sources = sources
        self._losses = torch.zeros(len(sources), dtype=torch.float64, device=platform.device())
        self._rows = torch.zeros(len(sources), dtype=torch.int64)

    def add(self, losses: Tensor, *, batch: Batch, pack: PackSlice) -> None:
        """Add the losses [L] of a slice, without waiting for the device.

        Each context-parallel rank adds its own.
        """
        # TP ranks have the same losses.
        if groups.tensor_group().rank() != 0:
            return
        positions = pack.positions[pack.loss_rows]
        document = torch.searchsorted(batch.document_starts, positions, right=True) - 1
        # Never the tail's, which has no loss tokens.
        self.add_items(losses, sources=batch.document_sources[document])

    def add_items(self, losses: Tensor, *, sources: Tensor) -> None:
        """Add losses [n], with their datasets [n] on the host, without waiting for the device."""
        self._rows += torch.bincount(sources, minlength=len(self._rows))
        there = to_device(sources, losses.device)
        self._losses.index_add_(0, there, losses.detach().double())

    def totals(self) -> tuple[Tensor, float]:
        """Return sum of losses and number of loss tokens of all sources, on this rank."""
        return self._losses.sum(), float(self._rows.sum())

    def put(self, meter: Meter) -> None:
        """Add the sums to `meter` by source."""
        for i, source in enumerate(self.sources):
            meter.add(f"loss/{source}", self._losses[i])
            meter.add(f"rows/{source}", float(self._rows[i]))


def count_batch(meter: Meter, batch: Batch, recipe: Recipe) -> None:
    """Count a pack once for its whole replica, on the rank that reports, from host data alone."""
    if not groups.is_reporting_rank():
        return
    for name, count in (
        ("tokens", batch.num_tokens),
        ("positions", len(batch.input_ids)),
        ("tiles", len(batch.placements)),
        ("documents", len(batch.sample_keys)),
        ("damaged", len(batch.masked) + len(batch.stand_ins)),
        ("stand_ins", sum(batch.stand_ins.values())),
    ):
        meter.add(name, count)
    rows = int((batch.labels != IGNORED_LABEL).sum())
    meter.add("loss_tokens", rows)
    tiles = len(batch.placements)
    flops = training_flops(recipe, batch.conversation_lengths, tiles=tiles, loss_tokens=rows)
    meter.add("flops", flops.total)
    meter.add("vision_flops", flops.vision)


def measure_memory(meter: Meter) -> None:
    """Add this rank's memory use on device and host."""
    use = platform.memory_use()
    sizes = {"memory/host_gib": use.host}
    if platform.on_cuda():
        sizes |= {
            "memory/peak_gib": use.peak,
            "memory/reserved_gib": use.reserved,
            "memory/pinned_gib": use.pinned,
        }
    for name, size in sizes.items():
        meter.add(name, size / GIB, reduce="max")


def collect(
    meter: Meter, losses: LossSums, *, step: int, started: float, held_out: bool = False
) -> StepMetrics:
    """Reduce the metrics of a step, or of a validation, over all ranks. Collective.

    Args:
        meter: values of the step.
        losses: losses of the step.
        step: number of the step.
        started: its start, by `time.perf_counter`.
    """
    losses.put(meter)
    # Without it, the seconds would leave out the work that the device still has to do.
    platform.synchronize()
    meter.add("seconds", time.perf_counter() - started, reduce="max")
    values = meter.reduce()
    sums = {name: values.pop(name, 0.0) for name in SUMS}
    preferences = {name: values.pop(name) for name in PREFERENCES if name in values}
    of_sources = {
        source: (values.pop(f"loss/{source}", 0.0), values.pop(f"rows/{source}", 0.0))
        for source in losses.sources
    }
    total = sum(loss for loss, _ in of_sources.values())
    rows = sum(count for _, count in of_sources.values())
    return StepMetrics(
        step=step,
        loss=total / max(rows, 1),
        loss_tokens=int(sums["loss_tokens"]),
        source_losses={
            source: loss / count for source, (loss, count) in of_sources.items() if count
        },
        tokens=int(sums["tokens"]),
        tiles=int(sums["tiles"]),
        documents=int(sums["documents"]),
        damaged=int(sums["damaged"]),
        stand_ins=int(sums["stand_ins"]),
        fill=sums["tokens"] / max(sums["positions"], 1),
        seconds=values.pop("seconds"),
        flops=sums["flops"],
        vision_flops=sums["vision_flops"],
        ranks=dist.get_world_size(),
        stops=values.pop("stops", 0.0) > 0,
        failed=values.pop("failed", 0.0) > 0,
        saving=values.pop(SAVING, 0.0) > 0,
        held_out=held_out,
        grad_norm=values.pop("grad_norm", 0.0),
        preferences=preferences,
        values=values,
    )


def reduce_numbers(losses: LossSums, grad_norm: float | Tensor) -> tuple[float, float]:
    """Return a step's loss and gradient norm over all ranks, before its metrics. Collective.

    One reduction and one copy from the device, which waits for it.
    """
    total, rows = losses.totals()
    sums = as_vector(total, rows, grad_norm)
    dist.all_reduce(sums)
    total, rows, norms = sums.tolist()
    return total / max(rows, 1), norms / dist.get_world_size()
