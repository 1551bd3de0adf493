"""The manifest of a checkpoint: position and recipe of its run, sizes and checksums of its files."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError, DamagedCheckpointError
from megatron_vita.files import atomic_write

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
FILES = "files"
CHECKSUM = "checksum"
TENSORS = ".distcp"
SCORES = "scores.json"
CHANGING = (MANIFEST, SCORES)
INDEX = ".metadata"
"""torch's description of all tensors, which a load verifies itself: it is read by every rank."""
Span = tuple[int, int, int]
"""Offset, length and CRC-32 of consecutive bytes in a file: a tensor, or all of a small file."""


def write_manifest(
    checkpoint: Path, values: Mapping[str, Any], *, files: Mapping[str, Sequence[Span]]
) -> None:
    """Write the manifest atomically.

    Args:
        checkpoint: folder of the checkpoint.
        values: plain values.
        files: spans of each file, in the order of their offsets, by its path in the checkpoint.
    """
    manifest = {"format_version": FORMAT_VERSION, **values, FILES: files}
    # As it will be read: JSON has neither tuples nor keys that are numbers.
    manifest = json.loads(json.dumps(manifest))
    manifest[CHECKSUM] = _checksum(manifest)
    with atomic_write(checkpoint / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: it is missing, cut or altered.
        CheckpointError: it has another format version.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise DamagedCheckpointError(f"{path}: is no object of JSON")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: format version {version}; this version reads {FORMAT_VERSION}; export "
            "it with the version that wrote it (convert to-hf), and import that (convert from-hf)"
        )
    # Earlier versions and conversions wrote none.
    checksum = manifest.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(manifest):
        raise DamagedCheckpointError(
            f"{path}: does not have the checksum that was written; an edited one must have none "
            f"(remove its {CHECKSUM!r})"
        )
    return manifest


def check_files(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Check the sizes of a checkpoint's files, and the bytes of the small ones.

    Tensors and their index are verified while they are loaded, so that nothing large is read twice.

    Raises:
        DamagedCheckpointError: names the file, and its size or checksum.
    """
    for name, spans in manifest.get(FILES, {}).items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: {error.strerror}") from error
        written = sum(length for _, length, _ in spans)
        if size != written:
            raise DamagedCheckpointError(f"{path}: has {size} bytes, and {written} were written")
        if path.suffix != TENSORS and path.name != INDEX:
            check_bytes(_read(path), path=path, span=spans[0])


def check_bytes(data: bytes, *, path: Path, span: Span) -> None:
    """Check the bytes of a span of a file.

    Raises:
        DamagedCheckpointError: names the file and the place.
    """
    offset, length, checksum = span
    if len(data) != length:
        raise DamagedCheckpointError(f"{path}: ends at byte {offset + len(data)}, cut off")
    if zlib.crc32(data) != checksum:
        raise DamagedCheckpointError(
            f"{path}: bytes {offset} to {offset + length} are not those that were written"
        )


def spans_of_small_files(checkpoint: Path) -> dict[str, list[Span]]:
    """Return a span for each file of a checkpoint that holds no tensors and stays as it is."""
    spans: dict[str, list[Span]] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.suffix != TENSORS and path.name not in CHANGING:
            data = path.read_bytes()
            name = str(path.relative_to(checkpoint))
            spans[name] = [(0, len(data), zlib.crc32(data))]
    return spans


def _checksum(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror}") from error
