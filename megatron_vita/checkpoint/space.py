"""Free disk space for checkpoints."""

import os
import shutil
from pathlib import Path

from megatron_vita.errors import CheckpointError
from megatron_vita.sizes import readable_bytes

HALVES = ".step_*.incomplete"
"""Names under which checkpoints are written and removed."""


def free_bytes(folder: Path) -> int:
    """Return the bytes free on the file system of `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def room_in(folder: Path) -> int:
    """Return the bytes available for a checkpoint in `folder`.

    Includes partial checkpoints left by killed jobs, which the next save removes first.
    """
    return free_bytes(folder) + sum(bytes_in(path) for path in folder.glob(HALVES))


def check_space(folder: Path, *, size: int) -> None:
    """Check that a checkpoint fits.

    Args:
        folder: folder of the checkpoints.
        size: bytes of its tensors; 0 if unknown.

    Raises:
        CheckpointError: it does not; names the bytes needed and free.
    """
    free = room_in(folder)
    if free < size:
        raise CheckpointError(f"checkpoint.save {folder}: {describe_lack(size, free=free)}")


def describe_lack(size: int, *, free: int) -> str:
    """Format the reason that a checkpoint of `size` bytes cannot be written, and the remedy."""
    return (
        f"no space for a checkpoint: it takes about {readable_bytes(size)} ({size} bytes), and "
        f"{readable_bytes(free)} ({free} bytes) are free; make room there or choose another folder"
    )


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder and below."""
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sum(file.stat().st_size for file in files)
