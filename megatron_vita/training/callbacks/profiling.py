"""Trace of some steps by torch's profiler, and on CUDA a snapshot of the allocator's memory.

Open the trace in Perfetto or chrome://tracing, the snapshot at https://pytorch.org/memory_viz.
"""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_vita import platform
from megatron_vita.config import TrainingConfig
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run

SNAPSHOT_ENTRIES = 1_000_000
logger = logging.getLogger(__name__)


class ProfileCallback(Callback):
    """Profiling of the steps `profile_step_start` to `profile_step_end` on the ranks
    `profile_ranks`.

    A run that fails in between still writes what was recorded.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.first = training.profile_step_start
        self.last = training.profile_step_end
        self.folder = Path(training.profile_dir)
        self.records = dist.get_rank() in training.profile_ranks
        self._profiler: profile | None = None

    def before_step(self, run: Run) -> None:
        """Start with the first step of the range, or the first that a resumed run has of it."""
        wanted = self.first <= run.step + 1 <= self.last
        if not (self.records and wanted) or self._profiler is not None:
            return
        activities = [ProfilerActivity.CPU]
        if platform.on_cuda():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Stop after the last step of the range."""
        if run.step >= self.last:
            self._write()

    def on_end(self, run: Run) -> None:
        """Write what a run that ends within the range has recorded."""
        self._write()

    def _write(self) -> None:
        if self._profiler is None:
            return
        profiler = self._profiler
        self._profiler = None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self.first}_to_{self.last}_rank_{dist.get_rank()}"
        trace = self.folder / f"{name}.trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        logger.info("profile: %s", trace)
        if platform.on_cuda():
            snapshot = self.folder / f"{name}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.info("memory snapshot: %s", snapshot)
