"""Facts about the program, its packages and its machine, for a run's records."""

import importlib.metadata
import shlex
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_vita
from megatron_vita import platform

PACKAGES = ("megatron-core", "transformer-engine", "flash-attn-4")
_GIT_SECONDS = 10


@cache
def describe_environment() -> dict[str, Any]:
    """Versions, commit, host and command of this process; called on one rank."""
    return {
        "version": megatron_vita.__version__,
        "commit": find_commit(),
        "packages": package_versions(),
        "python": sys.version.split()[0],
        "host": socket.gethostname(),
        "device": platform.device_name(),
        "ranks": dist.get_world_size(),
        "command": shlex.join(sys.orig_argv),
        "folder": str(Path.cwd()),
    }


def package_versions() -> dict[str, str]:
    """Versions of torch and the installed ones of `PACKAGES`."""
    found = {"torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_commit() -> str:
    """The commit that this package is at, with `-dirty` where tracked files differ from it; empty
    for an installed package, which may lie inside another project's checkout."""
    folder = Path(megatron_vita.__file__).parent
    if not _git(folder, "ls-files", "__init__.py"):
        return ""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of a git command; empty if it fails."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ended.stdout.strip()
