"""The folder of a run's checkpoints, looked at before the run begins: it must be one folder for all
ranks."""

import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

from megatron_vita.checkpoint import store
from megatron_vita.errors import CheckpointError

VISIBLE_SECONDS = 90.0
"""What a shared file system may take to show other hosts a new file: attribute caches of NFS last a minute."""


def check(folder: Path) -> None:
    """Makes `folder` where it is not there. Collective.

    CheckpointError, on all ranks, if one cannot write there, or does not see there what the first
    sees.
    """
    said: list[tuple[str, str, str]] = [_prepare(folder) if dist.get_rank() == 0 else ("", "", "")]
    dist.broadcast_object_list(said, src=0)
    probe, newest, problem = said[0]
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem or _look_for(folder, probe, newest))
    if dist.get_rank() == 0 and probe:
        (folder / probe).unlink(missing_ok=True)
    if any(problems):
        raise CheckpointError(next(filter(None, problems)))


def _prepare(folder: Path) -> tuple[str, str, str]:
    """By the first rank: the name of a file made there, the newest checkpoint's name, and what is
    wrong."""
    probe = f".probe_{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / probe).touch()
    except OSError as error:
        return "", "", f"checkpoint.save {folder}: cannot be written: {error}"
    try:
        return probe, _newest(folder), ""
    except (OSError, CheckpointError) as error:
        return probe, "", f"checkpoint.save {folder}: {error}"


def _newest(folder: Path) -> str:
    found = store.latest_checkpoint(folder)
    if found:
        return found.name
    return ""


def _look_for(folder: Path, probe: str, newest: str) -> str:
    """What is wrong with the folder as this rank sees it, after time for what the first rank sees
    to appear."""
    ends = time.monotonic() + VISIBLE_SECONDS
    while (problem := _difference(folder, probe, newest)) and time.monotonic() < ends:
        time.sleep(0.5)
    return problem


def _difference(folder: Path, probe: str, newest: str) -> str:
    where = f"checkpoint.save {folder} on {socket.gethostname()}"
    own = folder / f"{probe}.{dist.get_rank()}"  # each rank will write
    try:
        if not (folder / probe).exists():
            return f"{where} is not the folder that the first rank has: it must be on a file system that all hosts share"
        own.touch()
        own.unlink()
        found = _newest(folder)
    except (OSError, CheckpointError) as error:
        return f"{where}: {error}"
    if found != newest:
        return f"{where}: the newest checkpoint is {found or 'none'}, and {newest or 'none'} for the first rank"
    return ""
