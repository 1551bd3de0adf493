"""Memory-mapped safetensors: headers are checked first, tensors are views of the file.

The format is parsed here because the safetensors library keeps a file's memory map for as long as a
tensor lives, and its errors name no file.
"""

import json
import logging
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.convert.formats.tensors import TensorInfo
from megatron_vita.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
logger = logging.getLogger(__name__)
_MOST_HEADER = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True, kw_only=True)
class StoredTensor(TensorInfo):
    """A tensor and its offset in the file, in bytes."""

    start: int


class SafetensorsSource:
    """Tensors of a folder or of a single file."""

    def __init__(self, path: Path) -> None:
        """Read all headers.

        Raises:
            CheckpointError: a header, the index or a file is inconsistent; the message names file
                and tensor.
        """
        self._tensors: dict[str, StoredTensor] = {}
        for file in _files(path):
            header = read_header(file)
            for name, info in header.items():
                if name in self._tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name} is in {self._tensors[name].file.name}, too"
                    )
                self._tensors[name] = info
        _check_index(path, self._tensors)
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def infos(self) -> dict[str, StoredTensor]:
        """See TensorSource."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """Return a view of the file; its pages are read on access."""
        info = self._tensors[name]
        count = torch.Size(info.shape).numel()
        if count == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        view = memoryview(self._map(info.file))
        return torch.frombuffer(view, dtype=info.dtype, count=count, offset=info.start).view(
            info.shape
        )

    def expect(self, name: str) -> None:
        """Tells the system that a tensor will be read soon."""
        self._advise(name, mmap.MADV_WILLNEED)

    def release(self, name: str) -> None:
        """See TensorSource."""
        self._advise(name, mmap.MADV_DONTNEED)

    def _advise(self, name: str, advice: int) -> None:
        info = self._tensors[name]
        # madvise takes whole pages.
        first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.nbytes:
            self._map(info.file).madvise(advice, first, info.start + info.nbytes - first)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                # torch wants it writable
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a file from its header.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than it says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        # Checked before reading: a damaged length would allocate any amount of memory.
        if len(start) < 8 or length > min(size - 8, _MOST_HEADER):
            raise CheckpointError(
                f"{file}: has {size} bytes, too few for the header it announces: it is truncated or not safetensors"
            )
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: _entry(file, name, fields, 8 + length) for name, fields in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # CheckpointError is a ValueError, and has its message already.
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{file}: its header is not that of a safetensors file: {error!r}"
            ) from error
    _check_offsets(file, entries, start=8 + length, size=size)
    return entries


def _check_offsets(file: Path, entries: dict[str, StoredTensor], *, start: int, size: int) -> None:
    """Check that tensors fill the file from byte `start` to its end without gaps."""
    end = start
    # Empty tensors share their offset with the next one and must come first.
    for name, info in sorted(entries.items(), key=lambda entry: (entry[1].start, entry[1].nbytes)):
        if info.start != end:
            raise CheckpointError(
                f"{file}: tensor {name} begins at byte {info.start}; the one before it ends at {end}"
            )
        end += info.nbytes
        if end > size:
            raise CheckpointError(
                f"{file}: is truncated: tensor {name} ends at byte {end}, the file at {size}"
            )
    if end != size:
        raise CheckpointError(f"{file}: has {size - end} bytes after its last tensor")


def _entry(file: Path, name: str, fields: dict[str, Any], data: int) -> StoredTensor:
    start, stop = fields["data_offsets"]
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {fields['dtype']}; known: {', '.join(DTYPES)}"
        )
    info = StoredTensor(
        file=file, dtype=DTYPES[fields["dtype"]], shape=tuple(fields["shape"]), start=data + start
    )
    if stop - start != info.nbytes:
        raise CheckpointError(
            f"{file}: tensor {name} of {fields['dtype']} {list(info.shape)} needs {info.nbytes} bytes, "
            f"but its place has {stop - start}"
        )
    return info


def _files(path: Path) -> list[Path]:
    """Files of a source, in transformers' order of preference: a single file before an index.

    Raises:
        CheckpointError: a file is missing.
    """
    if path.is_file():
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if not (path / INDEX).exists():
        raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}")
    files = sorted({path / file for file in _weight_map(path).values()})
    for file in files:
        if not file.exists():
            names = [name for name, of in _weight_map(path).items() if path / of == file]
            raise CheckpointError(
                f"{path / INDEX}: names {file.name} for tensor {names[0]}, but there is no such file"
            )
    return files


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text())
        return {"weight_map": dict(index["weight_map"]), "metadata": index.get("metadata") or {}}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX}: is no index of tensors: {error!r}") from error


def _weight_map(path: Path) -> dict[str, str]:
    names = _read_index(path)["weight_map"]
    if not all(isinstance(file, str) and Path(file).name == file for file in names.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map names files outside its folder")
    return names


def _check_index(path: Path, infos: dict[str, StoredTensor]) -> None:
    """Check that the index lists exactly what the files hold."""
    # An index beside a single file is not read, as in transformers.
    if not (path / INDEX).exists() or (path / SINGLE).exists():
        return
    for name, file in _weight_map(path).items():
        if name not in infos:
            raise CheckpointError(
                f"{path / file}: has no tensor {name}, which {INDEX} places there"
            )
        if infos[name].file.name != file:
            raise CheckpointError(
                f"{path / INDEX}: places tensor {name} in {file}; it is in {infos[name].file.name}"
            )
    for name in infos.keys() - _weight_map(path).keys():
        raise CheckpointError(
            f"{infos[name].file}: has tensor {name}, of which {INDEX} knows nothing"
        )
    said = _read_index(path)["metadata"].get("total_size")
    found = sum(info.nbytes for info in infos.values())
    # Some published indexes have a wrong total, so this is only a warning.
    if said is not None and said != found:
        logger.warning(
            "%s: total_size is %s, but its tensors have %d bytes together",
            path / INDEX,
            said,
            found,
        )
