"""Reads packs ahead in worker processes, in the order asked for."""

import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.context import BaseContext

from torch.utils.data import DataLoader, Dataset

from megatron_vita.data.batch import Batch
from megatron_vita.data.stream import PackStream
from megatron_vita.errors import VitaError


class _Guarded(Dataset):
    """Hands errors back as values: raised in a worker, torch would bury the message in the worker's traceback."""

    def __init__(self, stream: PackStream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, pack_id: int) -> Batch | VitaError:
        try:
            return self._stream[pack_id]
        except VitaError as error:
            return error.with_traceback(None)


def _clean_processes() -> BaseContext:
    """Workers start from a process that has done nothing: a fork of this one could inherit a lock that a thread holds.

    (A fork hangs for good, for instance, where this process has met a damaged video before.)
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def pack_loader(stream: PackStream, pack_ids: Iterable[int], *, num_workers: int) -> Iterator[Batch]:
    """The Batches of `pack_ids` in that order, read by `num_workers` processes (0: by this one).

    An error of a worker is raised here as it was there. Closing or dropping the iterator ends the workers.
    """
    loader = DataLoader(
        _Guarded(stream),
        batch_size=None,
        sampler=pack_ids,
        num_workers=num_workers,
        multiprocessing_context=_clean_processes() if num_workers else None,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, VitaError):
                raise batch
            yield batch
    finally:
        if shut_down := getattr(batches, "_shutdown_workers", None):
            shut_down()  # torch's own clean-up waits for the garbage collector, which a kept traceback delays
