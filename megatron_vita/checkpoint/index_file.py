"""The index of a checkpoint's tensors, torch's pickled `.metadata`, read without running code."""

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

_MODULES = (
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_NAMES = (
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
)


def parse_index(data: bytes) -> Metadata:
    """Return the index that torch has pickled.

    Raises:
        pickle.UnpicklingError: it is not an index, or names a class that no index needs, which could
            run code.
    """
    index = _IndexUnpickler(io.BytesIO(data)).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(
            f"holds {type(index).__name__}, not the metadata of a checkpoint"
        )
    return index


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler restricted to the classes of torch's checkpoint metadata."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Resolve a class named in a pickle; UnpicklingError unless checkpoint metadata needs it."""
        if (module_name, global_name) in _NAMES:
            return super().find_class(module_name, global_name)
        # A dotted name could reach a function that the module has imported.
        if module_name in _MODULES and "." not in global_name:
            found = super().find_class(module_name, global_name)
            if isinstance(found, type) and found.__module__ == module_name:
                return found
        # Paths of the writer's file system are not used here.
        if module_name.split(".")[0] == "pathlib":
            return lambda *_: None
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(
            f"it names {module_name}.{global_name}, which no checkpoint needs"
        )
