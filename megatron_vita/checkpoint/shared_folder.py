"""Check, before a run begins, that all ranks see the same checkpoint folder and can write to it."""

import logging
import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.space import check_space, room_in
from megatron_vita.errors import CheckpointError
from megatron_vita.sizes import readable_bytes

logger = logging.getLogger(__name__)
VISIBLE_SECONDS = 90.0
"""Time for a new file to appear on other hosts: attribute caches of NFS last a minute."""


def check_shared(folder: Path, *, size: int = 0, count: int = 1) -> None:
    """Create `folder` if needed and check that every rank shares it. Collective.

    Warns if `count` checkpoints of `size` bytes, the most that the run will have, do not fit.

    Raises:
        CheckpointError: on all ranks, if any of them cannot write there or does not see the first
            rank's files, or if one checkpoint does not fit.
    """
    message = [("", "", "")]
    if dist.get_rank() == 0:
        message = [_prepare(folder, size)]
    dist.broadcast_object_list(message, src=0)
    probe, newest, problem = message[0]
    # Every rank takes part in both collectives, whatever it found: one that raised before would
    # leave the others waiting.
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem or _look_for(folder, probe, newest))
    if dist.get_rank() == 0 and probe:
        (folder / probe).unlink(missing_ok=True)
        _warn_of_lack(folder, size=size, count=count)
    if any(problems):
        raise CheckpointError(next(filter(None, problems)))


def _warn_of_lack(folder: Path, *, size: int, count: int) -> None:
    there = sum(store.is_saved(path) for path in folder.iterdir())
    needed = max(1, count - there) * size
    free = room_in(folder)
    if free < needed:
        logger.warning(
            "checkpoint.save %s will be full: %d checkpoints (checkpoint.keep and the one being written) need %s "
            "more, and %s are free",
            folder,
            count,
            readable_bytes(needed),
            readable_bytes(free),
        )


def _prepare(folder: Path, size: int) -> tuple[str, str, str]:
    """On the first rank: return a probe file's name, the newest checkpoint's name and the error, if
    any."""
    probe = f".probe_{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / probe).touch()
    except OSError as error:
        return "", "", f"checkpoint.save {folder}: cannot be written: {error}"
    try:
        check_space(folder, size=size)
    except CheckpointError as error:
        return probe, "", str(error)
    try:
        return probe, store.latest_name(folder), ""
    except (OSError, CheckpointError) as error:
        return probe, "", f"checkpoint.save {folder}: {error}"


def _look_for(folder: Path, probe: str, newest: str) -> str:
    """Compare this rank's view of the folder with the first rank's, for up to VISIBLE_SECONDS.

    Returns:
        The difference that remains; empty if there is none.
    """
    ends = time.monotonic() + VISIBLE_SECONDS
    while (problem := _difference(folder, probe, newest)) and time.monotonic() < ends:
        time.sleep(0.5)
    return problem


def _difference(folder: Path, probe: str, newest: str) -> str:
    where = f"checkpoint.save {folder} on {socket.gethostname()}"
    # Each rank writes its shards itself, so each must be able to create files.
    own = folder / f"{probe}.{dist.get_rank()}"
    try:
        if not (folder / probe).exists():
            return (
                f"{where} is not the folder that the first rank has: it must be on a file system "
                "that all hosts share"
            )
        own.touch()
        own.unlink()
        found = store.latest_name(folder)
    except (OSError, CheckpointError) as error:
        return f"{where}: {error}"
    if found != newest:
        return (
            f"{where}: the newest checkpoint is {found or 'none'}, and {newest or 'none'} for the "
            "first rank"
        )
    return ""
