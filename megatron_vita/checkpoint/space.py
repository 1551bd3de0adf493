"""Room on the disk of a folder of checkpoints."""

import os
import shutil
from pathlib import Path

from megatron_vita.errors import CheckpointError
from megatron_vita.sizes import readable_bytes

HALVES = ".step_*.incomplete"
"""Names under which checkpoints are written and removed."""


def free_bytes(folder: Path) -> int:
    """Bytes that may be written to the file system of `folder`, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def room_in(folder: Path) -> int:
    """Bytes for a checkpoint in `folder`: those that are free, and those of halves that killed jobs
    left, which the next one to be written replaces."""
    return free_bytes(folder) + sum(bytes_in(path) for path in folder.glob(HALVES))


def check_space(folder: Path, *, size: int) -> None:
    """Refuse a checkpoint that does not fit.

    size: bytes of its tensors; 0 where that is not known.

    Raises:
        CheckpointError: with the bytes needed and free.
    """
    free = room_in(folder)
    if free < size:
        raise CheckpointError(f"checkpoint.save {folder}: {describe_lack(size, free=free)}")


def describe_lack(size: int, *, free: int) -> str:
    """Why a checkpoint of `size` bytes cannot be written, and what to do."""
    return (
        f"no space for a checkpoint: it takes about {readable_bytes(size)} ({size} bytes), and "
        f"{readable_bytes(free)} ({free} bytes) are free; make room there or choose another folder"
    )


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder and below."""
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sum(file.stat().st_size for file in files)
