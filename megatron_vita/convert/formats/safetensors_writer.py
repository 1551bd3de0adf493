"""Writer of safetensors, one tensor at a time: headers and the index are computed beforehand."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, uint8

from megatron_vita.convert.formats.safetensors_reader import DTYPES, INDEX, SINGLE
from megatron_vita.convert.formats.synced_file import SyncedFile
from megatron_vita.convert.formats.tensors import TensorInfo

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes the tensors of `groups`, in their order, into files of at most `largest` bytes. A
    group is never split over two files."""

    def __init__(
        self, folder: Path, groups: list[Mapping[str, TensorInfo]], *, largest: int
    ) -> None:
        self.folder = folder
        shards = list(_shards(groups, largest))
        self._names = _file_names(len(shards))
        self._shards = iter(zip(self._names, shards, strict=True))
        self._left: list[str] = []
        self._file: SyncedFile | None = None
        if len(shards) > 1:
            # The index is known from shapes alone, before any tensor is written.
            _write_index(folder, dict(zip(self._names, shards, strict=True)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        if not self._left:
            self._open_next()
        assert self._file is not None
        assert name == self._left.pop(0), f"{name} is not the next tensor"
        flat = tensor.contiguous().reshape(-1).view(uint8)
        self._file.write(flat.numpy().data)

    def close(self) -> None:
        """Flush the last file to disk."""
        assert not self._left, f"{self._left[0]} was not written"
        if self._file is not None:
            self._file.close()

    def _open_next(self) -> None:
        self.close()
        file, tensors = next(self._shards)
        self._left = list(tensors)
        self._file = SyncedFile(self.folder / file)
        self._file.write(_header(tensors))


def _shards(
    groups: list[Mapping[str, TensorInfo]], largest: int
) -> Iterator[dict[str, TensorInfo]]:
    shard: dict[str, TensorInfo] = {}
    size = 0
    for group in groups:
        more = sum(info.nbytes for info in group.values())
        if shard and size + more > largest:
            yield shard
            shard = {}
            size = 0
        shard |= group
        size += more
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, info in tensors.items():
        stop = start + info.nbytes
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padding aligns the tensors, as the format asks for.
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _write_index(folder: Path, shards: dict[str, dict[str, TensorInfo]]) -> None:
    total = sum(info.nbytes for tensors in shards.values() for info in tensors.values())
    places = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
