"""Pickled weights of torch, memory-mapped and loaded without running code."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.convert.formats.tensors import TensorInfo
from megatron_vita.errors import CheckpointError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def load_pickle(file: Path) -> Any:
    """Load a file of tensors and plain values.

    Raises:
        CheckpointError: the file is damaged, in torch's old format, or holds other objects.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: there is no such file") from error
    except pickle.UnpicklingError as error:
        # torch's message is a page of advice; one line of it names the class.
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line),
            str(error),
        )
        raise CheckpointError(
            f"{file}: holds more than tensors and plain values, and is not run: {reason}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error


class PickledSource:
    """Tensors of a folder with `pytorch_model.bin` or its shards."""

    def __init__(self, folder: Path) -> None:
        """Map all files.

        Raises:
            CheckpointError: a file is missing or may not be loaded.
        """
        self._tensors: dict[str, Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        for file in _files(folder):
            loaded = load_pickle(file)
            if not isinstance(loaded, dict) or not all(
                isinstance(value, Tensor) for value in loaded.values()
            ):
                raise CheckpointError(f"{file}: is no dictionary of tensors")
            for name, tensor in loaded.items():
                self._tensors[name] = tensor
                self._infos[name] = TensorInfo(
                    file=file, dtype=tensor.dtype, shape=tuple(tensor.shape)
                )

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """See TensorSource."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """See TensorSource."""
        return self._tensors[name]

    def release(self, name: str) -> None:
        """See TensorSource. torch owns the memory map and keeps its pages."""


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is no index of tensors: {error!r}") from error
    for name in sorted(names):
        # A path in the index could lead out of the folder.
        if Path(name).name != name or not (folder / name).exists():
            raise CheckpointError(f"{index}: names {name}, but there is no such file in its folder")
    return [folder / name for name in sorted(names)]
