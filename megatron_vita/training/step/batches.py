"""Final batches of a rank: all ranks of a replica have agreed on the damaged samples.

Only the rank that decodes a sample notices that it cannot be read, but the labels change on all. So
each pack passes through an agreement of its replica's ranks, in a thread of its own, since the
stages of a pipeline ask for their packs at different times.
"""

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_vita import platform
from megatron_vita.data.batch import Batch, mask_documents
from megatron_vita.data.loading.ledger import Damage, Ledger, add_up_damage
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.stream import PackStream, ReadPack
from megatron_vita.data.loading.worker import PackTask
from megatron_vita.parallel import groups
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.streams import packs_of_replicas, packs_of_validation

CLOSING_SECONDS = 10
logger = logging.getLogger(__name__)


def train_batches(run: Run) -> "FinalBatches":
    """Return this rank's packs of all remaining steps, in order, divided among the replicas by
    cost."""
    assert run.train_stream is not None
    size = run.recipe.training.global_batch_size
    steps = run.recipe.training.train_iters - run.step
    firsts = run.skipped.firsts(run.consumed_packs, steps=steps, size=size)
    plan = run.train_stream.plan
    group = groups.data_parallel_group()
    ids = itertools.chain.from_iterable(
        packs_of_replicas(run.recipe, plan, first=first, replicas=group.size())[group.rank()]
        for first in firsts
    )
    # All ranks of a replica hold the same events; one of them writes.
    path = None
    if run.ledger_folder is not None and groups.is_first_of_replica():
        path = run.ledger_folder / f"replica_{group.rank():05d}.jsonl"
    run.ledger = Ledger(run.read_damage(), path=path)
    return _final_batches(run, run.train_stream, ids, purpose="main", ledger=run.ledger)


def validation_batches(run: Run) -> tuple["FinalBatches", int]:
    """Return this rank's packs of one validation, and their number.

    They are the first of the held-out plan, the same each time.
    """
    assert run.validation_stream is not None
    ids = held_out_packs(run)
    # A ledger of its own: damage of held-out packs is not the run's, and not saved.
    batches = _final_batches(run, run.validation_stream, ids, purpose="validation", ledger=Ledger())
    return batches, len(ids)


def held_out_packs(run: Run) -> range:
    """Return the numbers of this replica's packs of a validation."""
    assert run.validation_stream is not None
    group = groups.data_parallel_group()
    count = packs_of_validation(run.recipe, len(run.validation_stream), replicas=group.size())
    first = group.rank() * count
    return range(first, first + count)


def _final_batches(
    run: Run, stream: PackStream, ids: Iterable[int], *, purpose: groups.HostPurpose, ledger: Ledger
) -> "FinalBatches":
    data = run.recipe.data
    # Documents known to be damaged are not read again: one may have killed its reader. Made lazily,
    # since the ledger grows during the run.
    tasks = (
        PackTask(
            pack, frozenset(damage.document for damage in ledger.of_pack(pack) if damage.is_masked)
        )
        for pack in ids
    )
    packs = read_packs(
        stream,
        tasks,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        sample_seconds=data.sample_seconds,
    )
    agreement = Agreement(stream, ledger, group=groups.host_group(purpose))
    # Asked here: the current device is a setting of each thread.
    device = platform.device()
    return FinalBatches(packs, lambda pack: _pin_tiles(agreement.finish(pack), device))


def _pin_tiles(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with pinned tiles, which are copied to the device without waiting.

    Safe in another thread than the one that has selected the device.
    """
    # In this thread, since pinning takes time: the step only starts the copy.
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):
        return replace(batch, tiles=batch.tiles.pin_memory())


class Agreement:
    """Agreement of a group on its packs: samples that one rank cannot read are masked by all.

    They are recorded in the ledger.
    """

    def __init__(self, stream: PackStream, ledger: Ledger, *, group: ProcessGroup | None) -> None:
        self._stream = stream
        self._ledger = ledger
        self._group = group

    def finish(self, pack: ReadPack) -> Batch:
        """Return the batch of a pack, the same on all ranks except for their tiles. Collective."""
        batch = pack.batch
        # Events come from all ranks in one order, so that every ledger, and so every batch, becomes
        # the same.
        new = self._ledger.add(add_up_damage(self._gather(pack)))
        if self._group is None or self._group.rank() == 0:
            for damage in new:
                _warn_of(damage)
        events = self._ledger.of_pack(batch.pack_id)
        batch.stand_ins = {event.document: event.frames for event in events if not event.is_masked}
        masked = [event.document for event in events if event.is_masked]
        if not masked:
            return batch
        encoder = self._stream.encoders[0]
        return mask_documents(
            batch,
            masked,
            pad_id=encoder.tokenizer.pad_id,
            rows_per_tile=encoder.vision.image_token_length,
        )

    def _gather(self, pack: ReadPack) -> list[Damage]:
        if self._group is None:
            return pack.damages
        # Nearly all packs are intact: one small all-reduce instead of pickled lists.
        any_damaged = torch.tensor([len(pack.damages)])
        dist.all_reduce(any_damaged, group=self._group)
        if not any_damaged:
            return []
        gathered: list[Any] = [None] * self._group.size()
        dist.all_gather_object(gathered, pack.damages, group=self._group)
        return list(itertools.chain.from_iterable(gathered))


def _warn_of(damage: Damage) -> None:
    fate = f"{damage.frames} frames repeat others"
    if damage.is_masked:
        fate = "sample masked"
    logger.warning(
        "pack %d: %s: %s: %s: %s", damage.pack, fate, damage.shard, damage.key, damage.reason
    )


class FinalBatches(Iterator[Batch]):
    """Iterator over packs that a thread reads and finishes, one ahead of the one in use."""

    def __init__(
        self, packs: Generator[ReadPack] | Iterator[ReadPack], finish: Callable[[ReadPack], Batch]
    ) -> None:
        # One finished pack waits: each holds its tiles in pinned memory.
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._gate = threading.Lock()  # held while ranks agree on the last pack to finish
        self._begun = 0
        self._last = math.inf
        self._thread = threading.Thread(
            target=self._run, args=(packs, finish), name="batches", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, Batch):
            return item
        self._queue.put(item)  # a further call raises it again, instead of waiting for ever
        raise item

    def close(self) -> None:
        """End the thread and the loader processes.

        A thread that waits for a lost rank ends with this process.
        """
        self._closed.set()
        # Take what the thread is about to put: a full queue would keep it from seeing the flag.
        deadline = time.monotonic() + CLOSING_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)

    def close_together(self) -> None:
        """Close on all ranks after the same pack, so that none waits for the others in the
        agreement on one that they do not come to. Collective.

        Raises:
            Exception: the thread's, if it has failed: the other ranks wait for its packs.
        """
        with self._gate:
            begun = torch.tensor(self._begun, device=platform.device())
            dist.all_reduce(begun, op=dist.ReduceOp.MAX)
            self._last = begun.item()
        while self._thread.is_alive():
            self._drain()
        # What the thread has put at last is still there.
        self._drain()

    def _drain(self) -> None:
        """Drop a pack that waits; raise an error that does."""
        with suppress(queue.Empty):
            item = self._queue.get(timeout=0.05)
            if not isinstance(item, Batch | StopIteration):
                self._queue.put(item)  # for further calls
                raise item

    def _begin(self) -> bool:
        """Tell whether another pack is to be finished, and count it."""
        with self._gate:
            if self._closed.is_set() or self._begun >= self._last:
                return False
            self._begun += 1
            return True

    def _run(self, packs: Any, finish: Callable[[ReadPack], Batch]) -> None:
        try:
            for pack in packs:
                if not self._begin():
                    break
                self._queue.put(finish(pack))
            self._queue.put(StopIteration())
        except BaseException as error:
            # Raised by `__next__`, in the thread that can end the run.
            self._queue.put(error)
        finally:
            if close := getattr(packs, "close", None):
                close()
