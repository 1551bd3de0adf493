"""Reader of distributed checkpoints, one tensor at a time, whatever parallel layout wrote them.
Unpickling runs no code of theirs."""

import mmap
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_vita.checkpoint.index_file import parse_index
from megatron_vita.convert.families.mapping import TensorLocation
from megatron_vita.convert.formats.tensors import TensorInfo
from megatron_vita.errors import CheckpointError
from megatron_vita.rounding import round_up

_METADATA = ".metadata"

Box = list[tuple[int, int]]  # first and last + 1, axis by axis


class DistSource:
    """Tensors of a `torch_dist` checkpoint by key; shapes in `infos` include the axis of layers."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: it cannot be read, or would run code.
        """
        self.folder = folder
        self._reader = FileSystemReader(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        metadata = _read_metadata(folder / _METADATA)
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for key, described in metadata.state_dict_metadata.items():
            if isinstance(described, TensorStorageMetadata):
                self._chunks[key] = described.chunks
                dtype = described.properties.dtype
                self.infos[key] = TensorInfo(file=folder, dtype=dtype, shape=tuple(described.size))
        stored = cast(dict[Any, _StorageInfo], metadata.storage_data)
        self._places = {(index.fqn, index.offset): info for index, info in stored.items()}

    def read(self, location: TensorLocation, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or one layer of it without the axis of layers.

        Args:
            rows: first and last + 1 row to read; None for all.

        Returns:
            The tensor, which may be a view of the file.
        """
        box: Box = [(0, size) for size in self.infos[location.key].shape]
        if location.layer is not None:
            box[0] = (location.layer, location.layer + 1)
        if rows is not None:
            # The axis of layers comes first where there is one.
            box[0 if location.layer is None else 1] = rows
        parts = [
            (chunk, cut)
            for chunk in self._chunks[location.key]
            if (cut := _overlap(_box_of(chunk), box))
        ]
        # Chunks do not overlap, so that equal sizes mean that the box is covered.
        if sum(_count(cut) for _, cut in parts) != _count(box):
            raise CheckpointError(
                f"{self.folder}: the parts of tensor {location.key} do not make up all of it"
            )
        # A single chunk is returned as a view of the file, without a copy.
        if len(parts) == 1:
            whole = self._load(location.key, *parts[0])
        else:
            whole = torch.empty(
                [stop - start for start, stop in box], dtype=self.infos[location.key].dtype
            )
            for chunk, cut in parts:
                _narrow(whole, cut, within=box).copy_(self._load(location.key, chunk, cut))
        if location.layer is None:
            return whole
        return whole.squeeze(0)

    def release(self, location: TensorLocation) -> None:
        """Return the page memory that `read` used to the system."""
        for chunk in self._chunks[location.key]:
            if (
                location.layer is None
                or chunk.offsets[0] <= location.layer < chunk.offsets[0] + chunk.sizes[0]
            ):
                stored = self._places[(location.key, chunk.offsets)]
                # The first page may also hold the end of the preceding tensor, and stays.
                first = round_up(stored.offset, mmap.PAGESIZE)
                if (length := stored.offset + stored.length - first) > 0:
                    self._map(self.folder / stored.relative_path).madvise(
                        mmap.MADV_DONTNEED, first, length
                    )

    def _load(self, key: str, chunk: ChunkStorageMetadata, cut: Box) -> Tensor:
        """Read the box `cut` of a tensor from a chunk that contains it."""
        stored = self._places[(key, chunk.offsets)]
        file = self.folder / stored.relative_path
        try:
            tensor = self._view(file, stored)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file}: tensor {key} cannot be read: {_first_line(error)}"
            ) from error
        if tensor.shape != chunk.sizes:
            raise CheckpointError(
                f"{file}: tensor {key} has {list(tensor.shape)} there, not {list(chunk.sizes)}"
            )
        return _narrow(tensor, cut, within=_box_of(chunk))

    def _view(self, file: Path, stored: _StorageInfo) -> Tensor:
        """Open a tensor written by `torch.save`: unpickle its description only, and map its values."""
        # With skip_data only shapes, strides and offsets are read, not the values.
        with file.open("rb") as opened, torch.serialization.skip_data():
            part = self._reader._slice_file(opened, stored)
            described = torch.load(part, map_location="cpu", weights_only=True)
            part.seek(0)
            archive: Any = torch._C.PyTorchFileReader(cast(Any, part))
            start = stored.offset + archive.get_record_offset("data/0")
        count = described.untyped_storage().nbytes() // described.itemsize
        if count == 0:
            return described
        if start + count * described.itemsize > stored.offset + stored.length:
            raise ValueError("its values reach beyond its record")
        values = torch.frombuffer(
            memoryview(self._map(file)), dtype=described.dtype, count=count, offset=start
        )
        return values.as_strided(described.size(), described.stride(), described.storage_offset())

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                # torch wants it writable
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _box_of(chunk: ChunkStorageMetadata) -> Box:
    return [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def _overlap(one: Box, other: Box) -> Box:
    """Intersect two boxes; an empty list if they do not meet."""
    shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]
    if all(start < stop for start, stop in shared):
        return shared
    return []


def _count(box: Box) -> int:
    return torch.Size([stop - start for start, stop in box]).numel()


def _narrow(tensor: Tensor, cut: Box, *, within: Box) -> Tensor:
    """View of the box `cut` in a tensor that covers the box `within`."""
    for axis, ((start, stop), (first, _)) in enumerate(zip(cut, within, strict=True)):
        tensor = tensor.narrow(axis, start - first, stop - start)
    return tensor


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_metadata(file: Path) -> Metadata:
    try:
        return parse_index(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.parent}: is no distributed checkpoint: it has no {file.name}"
        ) from error
    except Exception as error:  # whatever damaged bytes make pickle raise
        raise CheckpointError(f"{file}: cannot be read: {_first_line(error)}") from error
