"""Distributed checkpoints read tensor by tensor, whatever layout wrote them. No pickle of theirs runs code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_vita.convert.table import Place
from megatron_vita.convert.tensors import TensorInfo
from megatron_vita.errors import CheckpointError

_SAFE_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_SAFE_NAMES = (("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"))


class DistSource:
    """The tensors of a `torch_dist` checkpoint by key; `infos` has shapes with all layers."""

    def __init__(self, folder: Path) -> None:
        """Reads what the checkpoint says of itself. CheckpointError if it cannot be read or would run code."""
        self.folder = folder
        self._reader = FileSystemReader(folder)
        metadata = _read_metadata(folder / ".metadata")
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for key, described in metadata.state_dict_metadata.items():
            if isinstance(described, TensorStorageMetadata):
                self._chunks[key] = described.chunks
                dtype = described.properties.dtype
                self.infos[key] = TensorInfo(file=folder, dtype=dtype, shape=tuple(described.size))
        self._places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}

    def read(self, place: Place) -> Tensor:
        """A tensor, or one layer of it without the axis of layers, in memory of its own."""
        info = self.infos[place.key]
        low, high = (0, info.shape[0]) if place.layer is None else (place.layer, place.layer + 1)
        shape = (high - low, *info.shape[1:])
        parts = [chunk for chunk in self._chunks[place.key] if _overlap(chunk, low, high)[0] > 0]
        if sum(_overlap(chunk, low, high).numel() for chunk in parts) != Size(shape).numel():
            raise CheckpointError(f"{self.folder}: the parts of tensor {place.key} do not make up {list(shape)}")
        if len(parts) == 1:
            whole = self._load(place.key, parts[0], low, high)
        else:
            whole = torch.empty(shape, dtype=info.dtype)
            for chunk in parts:
                target = whole
                for axis, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    first = max(start, low) - low if axis == 0 else start
                    target = target.narrow(axis, first, _overlap(chunk, low, high)[0] if axis == 0 else size)
                target.copy_(self._load(place.key, chunk, low, high))
        return whole if place.layer is None else whole.squeeze(0)

    def _load(self, key: str, chunk: ChunkStorageMetadata, low: int, high: int) -> Tensor:
        """The rows of a chunk that lie between `low` and `high` of the whole."""
        place = self._places[(key, chunk.offsets)]
        file = self.folder / place.relative_path
        try:
            with file.open("rb") as stream:
                part = self._reader._slice_file(stream, place)
                tensor = torch.load(part, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file}: tensor {key} cannot be read: {_first_line(error)}") from error
        first = max(low - chunk.offsets[0], 0)
        return tensor.narrow(0, first, _overlap(chunk, low, high)[0])


def _overlap(chunk: ChunkStorageMetadata, low: int, high: int) -> Size:
    rows = min(chunk.offsets[0] + chunk.sizes[0], high) - max(chunk.offsets[0], low)
    return Size([rows, *chunk.sizes[1:]])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _SafeUnpickler(pickle.Unpickler):
    """Knows the classes of torch's checkpoint metadata, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that a pickle names. UnpicklingError for one that has no business there."""
        if (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        if module in _SAFE_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module.split(".")[0] == "pathlib":
            return lambda *_: None  # where it was written, which is not used
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _read_metadata(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            metadata = _SafeUnpickler(stream).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent}: is no distributed checkpoint: it has no {file.name}") from error
    except Exception as error:  # whatever damaged bytes make pickle raise
        raise CheckpointError(f"{file}: cannot be read: {_first_line(error)}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file}: holds {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata
