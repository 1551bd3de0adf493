"""Patches of megatron-core's checkpoints: no manager process, no copies of host tensors, no garbage
collection, and a reader of our own."""

import gc
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.optimizer import distrib_optimizer
from torch.distributed.checkpoint import FileSystemReader

_MAKE_READER = "_get_filesystem_reader"


def use_local_results_queue() -> None:
    """Keep megatron-core from starting a manager process.

    It would hold a queue for what other processes report; ours report through pipes. A launcher's
    SIGTERM ends the manager, and a manager that outlives its rank keeps the launcher's output open.
    """
    filesystem_async._results_queue = queue.Queue()


@contextmanager
def planning_without_copies() -> Iterator[None]:
    """Let megatron-core plan a save without copying parts of host tensors: its writer then has
    views of them.

    It has no setting for it. The ranges of an optimizer are such parts, twelve bytes a parameter;
    a process that is forked to write has them as they are, without a copy.
    """
    writer_class: Any = filesystem_async.FileSystemWriterAsync
    prepare = writer_class.prepare_write_data

    def prepare_views(writer: Any, plan: Any, planner: Any) -> None:
        views: dict[Any, torch.Tensor] = {}
        resolve = planner.resolve_data

        def resolve_later(item: Any) -> Any:
            data = resolve(item)
            if not isinstance(data, torch.Tensor) or data.device.type != "cpu":
                return data
            views[item.index] = data.detach()
            # All of its own storage, which is not copied.
            return torch.empty(0)

        planner.resolve_data = resolve_later
        try:
            prepare(writer, plan, planner)
        finally:
            del planner.resolve_data
        for _, _, (_, tensors) in writer.write_buckets:
            tensors[:] = [(item, views.get(item.index, data)) for item, data in tensors]

    writer_class.prepare_write_data = prepare_views
    try:
        yield
    finally:
        writer_class.prepare_write_data = prepare


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep megatron-core from collecting the garbage of the whole process, which takes half a
    second and more: it does so after it has gathered an optimizer's state, which is not done here.
    """
    module: Any = distrib_optimizer
    module.gc = SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        module.gc = gc


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
