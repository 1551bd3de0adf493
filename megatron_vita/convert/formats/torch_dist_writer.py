"""Writer of distributed checkpoints by a single process, one tensor at a time.

megatron-core's own save needs the whole state in memory. torch's distributed checkpoint asks a
planner for each tensor when its turn comes, and megatron-core can load the result.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
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
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_vita.convert.families.mapping import TensorLocation
from megatron_vita.convert.formats.synced_file import SyncedFile


@dataclass(frozen=True, kw_only=True)
class TensorChunk:
    """A part of a checkpoint's tensor (all of it, a layer, or rows of these), created on demand."""

    location: TensorLocation
    rows: tuple[int, int] | None  # of the tensor or layer, where it is only some of them
    whole: tuple[int, ...]  # shape under the key, its layers included
    dtype: torch.dtype
    make: Callable[[], Tensor]
    done: Callable[[], None]  # told when it is written

    @property
    def offsets(self) -> Size:
        """Offset of the chunk in the whole tensor, axis by axis."""
        offsets = [0] * len(self.whole)
        if self.location.layer is not None:
            offsets[0] = self.location.layer
        if self.rows is not None:
            offsets[self._row_axis] = self.rows[0]
        return Size(offsets)

    @property
    def sizes(self) -> Size:
        """Shape of the chunk, with all axes of the whole tensor."""
        sizes = list(self.whole)
        if self.location.layer is not None:
            sizes[0] = 1
        if self.rows is not None:
            sizes[self._row_axis] = self.rows[1] - self.rows[0]
        return Size(sizes)

    @property
    def _row_axis(self) -> int:
        # layers are stacked along the first axis
        return 0 if self.location.layer is None else 1


def write_distributed(folder: Path, chunks: list[TensorChunk]) -> None:
    """Write a checkpoint that megatron-core loads at any parallel layout; only one chunk is in
    memory at a time."""
    writer = _OneByOne(folder, thread_count=1, overwrite=False)
    try:
        save({}, storage_writer=writer, planner=_Planner(chunks), no_dist=True)
    except CheckpointException as error:  # torch wraps whatever was raised
        # torch wraps every error of a writer; users should see the one with file and tensor.
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))


def _common_state() -> tuple[MetadataIndex, io.BytesIO]:
    """megatron-core's object for everything that is no tensor; it is empty but required."""
    data = io.BytesIO()
    torch.save([{}], data)
    return MetadataIndex(ShardedObject("common_state", None, (1,), (0,)).unique_key), data


class _Planner(SavePlanner):
    """Planner that knows the shapes of chunks and creates their data when asked for it."""

    def __init__(self, chunks: list[TensorChunk]) -> None:
        self.chunks = {MetadataIndex(chunk.location.key, chunk.offsets): chunk for chunk in chunks}
        assert len(self.chunks) == len(chunks), "two chunks of one location"

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Do nothing: there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        """Plan one item per chunk, in the order of the chunks."""
        items = [_item(index, chunk) for index, chunk in self.chunks.items()]
        return SavePlan([WriteItem(index=_common_state()[0], type=WriteItemType.BYTE_IO), *items])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Describe the chunks in the metadata that readers need; the plan stays as it is."""
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
        """Return the plan unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Create the data of a chunk."""
        if write_item.type == WriteItemType.BYTE_IO:
            return _common_state()[1]
        chunk = self.chunks[write_item.index]
        return chunk.make().reshape(chunk.sizes)

    def written(self, write_item: WriteItem) -> None:
        """Notify a chunk that it has been written."""
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
    """Writer that keeps no reference to a written tensor; torch's keeps all until the file is
    complete."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all items into one file, in the order of the plan."""
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
                # Freed before the next chunk is created: peak memory is that of the largest one.
                del data
                length = stream.tell() - start
                planner.written(item)
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future
