"""Patches of megatron-core's checkpoints: no manager process, and a reader of our own."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint import FileSystemReader

_MAKE_READER = "_get_filesystem_reader"


def use_local_results_queue() -> None:
    """Keep megatron-core from starting a manager process.

    It would hold a queue for what other processes report; ours report through pipes. A launcher's
    SIGTERM ends the manager, and a manager that outlives its rank keeps the launcher's output open.
    """
    filesystem_async._results_queue = queue.Queue()


@contextmanager
def reading_with(reader: FileSystemReader) -> Iterator[None]:
    """Let megatron-core read a checkpoint through `reader`, for which it has no setting."""
    modules: tuple[Any, ...] = (serialization, torch_strategy)
    before = [getattr(module, _MAKE_READER) for module in modules]
    for module in modules:
        setattr(module, _MAKE_READER, lambda *_, **__: reader)
    try:
        yield
    finally:
        for module, make in zip(modules, before, strict=True):
            setattr(module, _MAKE_READER, make)
