"""Detection of ranks that are slower than the others, with the causes of their time."""

import logging
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_vita.parallel import groups
from megatron_vita.platform.waits import CollectiveWaits
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run

SLOW_RANK = "speed/slow_rank"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Seconds of a rank over some steps, by cause.

    stage: pipeline stage; stages have different work.
    data: waiting for packs.
    communication: waiting in collectives for other ranks and the network.
    """

    rank: int
    host: str
    stage: int
    seconds: float
    data: float
    communication: float

    @property
    def own(self) -> float:
        """Seconds that the rank did not wait for others."""
        return self.seconds - self.communication

    @property
    def compute(self) -> float:
        """Seconds of everything except data and communication."""
        return self.own - self.data

    @property
    def shares(self) -> dict[str, float]:
        """Fractions of the time, by cause."""
        parts = {
            "data": self.data, "compute": self.compute, "communication": self.communication,
        }  # fmt: skip
        return {name: seconds / self.seconds for name, seconds in parts.items()}


@dataclass(frozen=True, kw_only=True)
class SlowRank:
    """A rank that takes `factor` times as long by itself as the median of its stage."""

    times: RankTimes
    factor: float


def find_slow_ranks(ranks: Sequence[RankTimes], *, factor: float) -> list[SlowRank]:
    """Return the ranks slower than the median of their stage by `factor`, the slowest first."""
    slow = []
    for stage in sorted({times.stage for times in ranks}):
        members = [times for times in ranks if times.stage == stage]
        # The lower middle, so that of two ranks the slower one can exceed it.
        middle = statistics.median_low(times.own for times in members)
        slow += [
            SlowRank(times=times, factor=times.own / middle)
            for times in members
            if times.own > factor * middle
        ]
    return sorted(slow, key=lambda found: found.factor, reverse=True)


class SlowRankCallback(Callback):
    """Comparison of the ranks' times every `training.slow_rank_steps` steps."""

    collective = True

    def __init__(self, *, steps: int, factor: float) -> None:
        self._steps = steps
        self._factor = factor
        self._waits = CollectiveWaits()
        self._seconds = 0.0
        self._count = 0
        self._data = 0.0
        self._communication = 0.0
        self._began = 0.0
        self._data_before = 0.0
        self._waited_before = 0.0

    def on_start(self, run: Run) -> None:
        """Start to measure waits for collectives."""
        self._waits.start()

    def before_step(self, run: Run) -> None:
        """Start to measure the step, without validation and saving."""
        self._data_before = run.data_seconds
        self._waited_before = self._waits.seconds
        self._began = time.perf_counter()

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Add the step's times; compare the ranks, a collective, every so many steps."""
        self._seconds += time.perf_counter() - self._began
        self._data += run.data_seconds - self._data_before
        self._communication += self._waits.seconds - self._waited_before
        self._count += 1
        if self._count < self._steps:
            return
        mine = RankTimes(
            rank=dist.get_rank(),
            host=socket.gethostname(),
            stage=groups.pipeline_rank(),
            seconds=self._seconds,
            data=self._data,
            communication=self._communication,
        )
        # Anew for each comparison: a rank that has been slow long ago is not named again.
        self._count = 0
        self._seconds = 0.0
        self._data = 0.0
        self._communication = 0.0
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        if slow := find_slow_ranks(gathered, factor=self._factor):
            self._tell(slow, step=run.step, steps=self._steps)
            metrics.values |= _as_metrics(slow[0])

    def on_end(self, run: Run) -> None:
        """Stop measuring waits for collectives."""
        self._waits.stop()

    def _tell(self, slow: Sequence[SlowRank], *, step: int, steps: int) -> None:
        if dist.get_rank() != 0:
            return
        for found in slow:
            shares = ", ".join(f"{name} {part:.0%}" for name, part in found.times.shares.items())
            logger.warning(
                "step %d: rank %d on %s takes %.1f times as long as the median of its stage over %d steps: %s",
                step,
                found.times.rank,
                found.times.host,
                found.factor,
                steps,
                shares,
            )


def _as_metrics(slow: SlowRank) -> dict[str, float]:
    """Return the slowest rank as metrics of the step."""
    named = {f"{SLOW_RANK}_{name}_share": part for name, part in slow.times.shares.items()}
    return {SLOW_RANK: float(slow.times.rank), f"{SLOW_RANK}_factor": slow.factor} | named
