"""Distributed checkpoints written by one process, tensor by tensor.

megatron-core's own save holds the whole state; torch's distributed checkpoint asks a planner for
each tensor when its turn comes, and megatron-core reads what it writes.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_vita.convert.families.mapping import TensorLocation
from megatron_vita.convert.formats.synced_file import SyncedFile


@dataclass(frozen=True, kw_only=True)
class TensorChunk:
    """A tensor of the checkpoint, whole or one layer of it, and how it is made when its turn
    comes."""

    location: TensorLocation
    rows: tuple[int, int] | None  # of the tensor or layer, where it is only some of them
    whole: tuple[int, ...]  # shape under the key, its layers included
    dtype: torch.dtype
    make: Callable[[], Tensor]
    done: Callable[[], None]  # told when it is written

    @property
    def offsets(self) -> Size:
        """Where it begins in the whole."""
        zeros = [0] * len(self.whole)
        first = [] if self.location.layer is None else [self.location.layer]
        own = [] if self.rows is None else [self.rows[0]]
        return Size([*first, *own, *zeros][: len(zeros)])

    @property
    def sizes(self) -> Size:
        """Its own shape in the whole."""
        own = list(self.whole if self.location.layer is None else self.whole[1:])
        if self.rows is not None:
            own[0] = self.rows[1] - self.rows[0]
        return Size(own if self.location.layer is None else [1, *own])


def write_distributed(folder: Path, chunks: list[TensorChunk]) -> None:
    """Writes a checkpoint that megatron-core loads at any layout, holding one chunk at a time."""
    writer = _OneByOne(folder, thread_count=1, overwrite=False)
    try:
        dcp.save({}, storage_writer=writer, planner=_Planner(chunks), no_dist=True)
    except CheckpointException as error:  # torch wraps whatever was raised
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))


def _common_state() -> tuple[MetadataIndex, io.BytesIO]:
    """megatron-core's object of what is no tensor: empty, but it must be there."""
    data = io.BytesIO()
    torch.save([{}], data)
    return MetadataIndex(ShardedObject("common_state", None, (1,), (0,)).unique_key), data


class _Planner(SavePlanner):
    """Plans from chunks' shapes, and makes a chunk when its data is asked for."""

    def __init__(self, chunks: list[TensorChunk]) -> None:
        self.chunks = {MetadataIndex(chunk.location.key, chunk.offsets): chunk for chunk in chunks}
        assert len(self.chunks) == len(chunks), "two chunks of one location"

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: the state is not given at once."""

    def create_local_plan(self) -> SavePlan:
        """One item for each chunk, in their order."""
        items = [_item(index, chunk) for index, chunk in self.chunks.items()]
        return SavePlan([WriteItem(index=_common_state()[0], type=WriteItemType.BYTE_IO), *items])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The plan as it is, and what readers must know of it."""
        described: dict[str, Any] = {_common_state()[0].fqn: BytesStorageMetadata()}
        for chunk in self.chunks.values():
            properties = TensorProperties(dtype=chunk.dtype)
            entry = described.setdefault(
                chunk.location.key,
                TensorStorageMetadata(properties=properties, size=Size(chunk.whole), chunks=[]),
            )
            entry.chunks.append(ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.sizes))
        return all_plans, Metadata(state_dict_metadata=described)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Makes a chunk."""
        if write_item.type == WriteItemType.BYTE_IO:
            return _common_state()[1]
        chunk = self.chunks[write_item.index]
        return chunk.make().reshape(chunk.sizes)

    def written(self, write_item: WriteItem) -> None:
        """Tells a chunk that it is written."""
        if write_item.type != WriteItemType.BYTE_IO:
            self.chunks[write_item.index].done()


def _item(index: MetadataIndex, chunk: TensorChunk) -> WriteItem:
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.sizes),
        properties=TensorProperties(dtype=chunk.dtype),
        size=Size(chunk.whole),
    )
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


class _OneByOne(FileSystemWriter):
    """torch's writer keeps a reference to every tensor until the file is complete; this one to
    none."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All items into one file, in the order of the plan."""
        assert isinstance(planner, _Planner)
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with SyncedFile(Path(self.path) / name) as stream:
            for item in plan.items:
                start = stream.tell()
                data = planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    torch.save(data, cast(IO[bytes], stream))
                del data
                length = stream.tell() - start
                planner.written(item)
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future
