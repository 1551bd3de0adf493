"""Saves of a run, one at a time: planned together, written by each rank, published by the first.

A checkpoint is written under a temporary name and renamed when all ranks are done. A kill at any
moment leaves the last complete one as the latest.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)

from megatron_vita import platform
from megatron_vita.checkpoint.claim import Claim
from megatron_vita.checkpoint.manifest import Span, spans_of_small_files, write_manifest
from megatron_vita.checkpoint.retention import Retention, name_of, note_scores, remove
from megatron_vita.checkpoint.space import HALVES, bytes_in, check_space, describe_lack, free_bytes
from megatron_vita.checkpoint.tokenizer_copy import copy_tokenizer
from megatron_vita.checkpoint.writing import PlannedSave, Progress, Share, WriterProcess, Written
from megatron_vita.errors import CheckpointError, ClaimedError, SaveError
from megatron_vita.files import atomic_write, publish, sync
from megatron_vita.parallel import groups
from megatron_vita.platform.saving import planning_without_copies, use_local_results_queue

use_local_results_queue()
LATEST = "latest"
FULL = 1 << 16
"""A file system with fewer free bytes counts as full."""


class Saver:
    """Saves to one folder, of which at most one is under way.

    Args:
        folder: parent of all checkpoints of the run.
        retention: the rules by which older ones are kept.
        tokenizer: path of a tokenizer to copy into each checkpoint; empty for none.
        size: estimated bytes of the tensors of all ranks; 0 if unknown.
        in_background: write in a process beside each rank.
        claim: the job's claim to the folder, which is checked before anything is changed there.
        on_progress: called while this rank waits for a write that makes progress.
    """

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention,
        tokenizer: str = "",
        size: int = 0,
        in_background: bool = False,
        claim: Claim | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._retention = retention
        self._tokenizer = tokenizer
        self._size = size
        self._in_background = in_background
        self._claim = claim
        self._on_progress = on_progress
        self._save: _Save | None = None
        self._scores: dict[int, dict[str, float]] = {}  # by step

    @property
    def is_active(self) -> bool:
        """True from `start` until `finish`."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """True while this rank's process writes."""
        process = self._save and self._save.process
        return bool(process and process.is_writing)

    def start(self, *, step: int, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Begin to save a sharded `state`; on return it may change. Collective.

        Args:
            step: optimizer steps done; names the checkpoint.
            state: megatron-core's sharded state.
            manifest: plain values for manifest.json.

        Raises:
            SaveError: on all ranks, if nothing can be written there.
            ClaimedError: on all ranks, if a later job saves there.
        """
        assert self._save is None, "the save before it is finished first"
        temporary = self.folder / f".{name_of(step)}.incomplete"
        by_first(lambda: self._begin(temporary))
        share = _plan(state, temporary)
        self._save = _Save(step=step, temporary=temporary, share=share, manifest=manifest)
        if self._in_background:
            self._save.write_in_background()
        else:
            share.note_progress = self._on_progress
            self._save.written = share.write()

    def finish(self) -> Path:
        """Wait until all ranks have written, and make it the latest checkpoint. Collective.

        Returns:
            Path of the checkpoint.

        Raises:
            SaveError: on all ranks, if it cannot be written; the next save removes what is left of it.
            ClaimedError: on all ranks, if a later job saves there.
        """
        save = self._save
        assert save is not None, "no save was started"
        self._save = None
        if save.process is not None:
            save.written = save.process.result(self._on_progress)
        platform.store_barrier()
        gathered: list[Any] | None = None
        if dist.get_rank() == 0:
            gathered = [None] * dist.get_world_size()
        dist.gather_object(save.written, gathered)
        by_first(lambda: self._publish(save, gathered or []))
        return save.final

    def note_scores(self, scores: dict[str, float], *, step: int) -> None:
        """Note metrics of a step for its checkpoint, if it has one or will have one."""
        if dist.get_rank() != 0:
            return
        oldest = self._save.step if self._save else step
        self._scores = {at: known for at, known in self._scores.items() if at >= oldest}
        self._scores.setdefault(step, {}).update(scores)
        checkpoint = self.folder / name_of(step)
        if checkpoint.exists():
            note_scores(checkpoint, self._scores[step])

    def forget_scores(self, *, after: int) -> None:
        """Forget the metrics of steps after `after`, which are done again."""
        self._scores = {at: known for at, known in self._scores.items() if at <= after}

    def abort(self) -> None:
        """Give up the save under way; the next one removes what it has written."""
        if self._save is not None and self._save.process is not None:
            self._save.process.kill()
        self._save = None

    def _begin(self, temporary: Path) -> None:
        """On the first rank: create the folder to write to, after removing what a killed job left
        behind."""
        self._check_claim()
        for left_behind in self.folder.glob(HALVES):
            shutil.rmtree(left_behind, ignore_errors=True)
        check_space(self.folder, size=self._size)
        temporary.mkdir(parents=True)

    def _check_claim(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _publish(self, save: "_Save", written: list[Written]) -> None:
        """On the first rank: complete the checkpoint, make it the latest, and delete old ones."""
        self._check_claim()
        reason = next((part.error for part in written if part.error), "")
        try:
            if not reason:
                self._complete(save, written)
        except OSError as error:
            reason = str(error)
        if reason:
            _give_up(save.temporary, size=self._size, reason=reason)
        # A run resumed from an earlier step reaches this one again.
        if save.final.exists():
            remove(save.final)
        # In this order, `latest` names a complete checkpoint at any moment, and an older one is
        # deleted only after it is no longer the one to resume from.
        publish(save.temporary, save.final)
        set_latest(save.final)
        self._retention.prune(self.folder, newest=save.final)

    def _complete(self, save: "_Save", written: list[Written]) -> None:
        """Add what describes the tensors: index, configuration, tokenizer, and the manifest."""
        assert save.share.metadata is not None
        save.share.writer.finish(save.share.metadata, [part.results for part in written])
        save_config(CheckpointingConfig("torch_dist", 1), str(save.temporary))
        if self._tokenizer:
            copy_tokenizer(self._tokenizer, save.temporary)
        if save.step in self._scores:
            note_scores(save.temporary, self._scores[save.step])
        files: dict[str, list[Span]] = spans_of_small_files(save.temporary)
        for part in written:
            files |= part.spans
        write_manifest(save.temporary, {"step": save.step, **save.manifest}, files=files)
        sync(save.temporary)


class _Save:
    """A save under way."""

    def __init__(
        self, *, step: int, temporary: Path, share: Share, manifest: dict[str, Any]
    ) -> None:
        self.step = step
        self.temporary = temporary
        self.final = temporary.parent / name_of(step)
        self.share = share
        self.manifest = manifest
        self.process: WriterProcess | None = None
        self.written: Written | None = None

    def write_in_background(self) -> None:
        """Copy the share to the host and start the process that writes it."""
        try:
            self.share.copy_to_host()
            progress = Progress()
            self.share.note_progress = progress.note
            self.process = WriterProcess(self.share.write, progress=progress)
        # For lack of memory, on this rank alone: `finish` reports it to the others.
        except (OSError, RuntimeError, MemoryError) as error:
            self.written = Written(error=str(error))


def set_latest(checkpoint: Path) -> None:
    """Make a checkpoint the one that a run resumes from."""
    with atomic_write(checkpoint.parent / LATEST) as partial:
        partial.write_text(checkpoint.name)


def by_first(action: Callable[[], None]) -> None:
    """Run `action` on the first rank while the others wait, however long. Collective.

    Raises:
        SaveError: on all ranks, if it fails with an OSError or a CheckpointError.
        ClaimedError: on all ranks, if it fails with one.
    """
    name = ""
    text = ""
    unexpected: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        # Any error must reach the others, which wait without a limit.
        except Exception as error:
            name = ClaimedError.__name__ if isinstance(error, ClaimedError) else SaveError.__name__
            text = str(error) or type(error).__name__
            if not isinstance(error, (OSError, CheckpointError)):
                unexpected = error
    name, text = platform.broadcast_from_first([name, text])
    if unexpected is not None:
        raise unexpected
    if name:
        raise {kind.__name__: kind for kind in (ClaimedError, SaveError)}[name](text)


def _plan(state: dict[str, Any], temporary: Path) -> Share:
    """Divide the tensors among the ranks that hold them, and return this rank's share. Collective."""
    replicas = groups.data_parallel_group(with_context_parallel=True)
    planned = PlannedSave()
    with planning_without_copies():
        dist_checkpointing.save(
            state,
            str(temporary),
            sharded_strategy=FullyParallelSaveStrategyWrapper(planned, replicas),
            # The strategy checks it itself, after it has decided which rank writes which tensor.
            validate_access_integrity=False,
            async_sharded_save=True,
            async_strategy="mcore",
        )
    return planned.share


def _give_up(temporary: Path, *, size: int, reason: str) -> None:
    """Remove half a checkpoint, which would keep the disk full, and raise SaveError."""
    folder = temporary.parent
    written = bytes_in(temporary)
    free = free_bytes(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    if free < FULL or written + free < size:
        reason = describe_lack(max(size, written), free=written + free)
    raise SaveError(f"checkpoint.save {folder}: {reason}; nothing is left of it")
