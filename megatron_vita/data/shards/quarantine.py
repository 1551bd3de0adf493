"""Quarantine: list of a shard's samples that must not be used, `train-000000.quarantine.json`.

Nothing is deleted. `index` lists samples that it cannot read, `validate` those that cannot be
decoded; an index leaves out the listed samples, so that no plan and no run uses them.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.errors import DataError
from megatron_vita.files import atomic_write

FORMAT_VERSION = 1


@dataclass(frozen=True, order=True)
class Entry:
    """A quarantined sample, the tool (`index` or `validate`) and the reason.

    An empty key is the rest of the tar.
    """

    by: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    """Quarantine of a shard of `shard_size` bytes; `validated` describes a complete validation."""

    shard_size: int
    entries: list[Entry] = field(default_factory=list)
    validated: dict[str, Any] | None = None

    def stamp(self) -> str:
        """Digest of the keys of damaged samples, whatever else a template refuses."""
        # An index depends on the samples that are left out, not on the reasons.
        keys = json.dumps(sorted(entry.key for entry in self.entries if entry.by == "validate"))
        return hashlib.sha256(keys.encode()).hexdigest()

    def replaced(
        self, by: str, entries: Iterable[Entry], *, validated: dict[str, Any] | None = None
    ) -> "Quarantine":
        """Replace the entries of one of the tools."""
        kept = [entry for entry in self.entries if entry.by != by]
        return Quarantine(
            shard_size=self.shard_size,
            entries=sorted([*kept, *entries]),
            validated=validated or self.validated,
        )


def quarantine_path(shard: Path) -> Path:
    """Path of a shard's quarantine."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".quarantine.json")


def read_quarantine(shard: Path) -> Quarantine:
    """Read the quarantine of a shard.

    It is empty if there is no file, or if the file belongs to an earlier shard of this name: of
    another size, or older than the shard.

    Raises:
        DataError: the file is damaged.
    """
    path = quarantine_path(shard)
    empty = Quarantine(shard_size=shard.stat().st_size)
    if not path.exists() or path.stat().st_mtime_ns < shard.stat().st_mtime_ns:
        return empty
    try:
        tree = json.loads(path.read_bytes())
        if tree.pop("format_version") != FORMAT_VERSION or tree["shard_size"] != empty.shard_size:
            return empty
        entries = [Entry(**entry) for entry in tree.pop("entries")]
        return Quarantine(**tree, entries=entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a list of quarantined samples: {error}; delete it") from error


def write_quarantine(quarantine: Quarantine, shard: Path) -> None:
    """Write a quarantine atomically, unless the file already says the same."""
    path = quarantine_path(shard)
    if path.exists() and read_quarantine(shard) == quarantine:
        return
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(quarantine)}, indent=1).encode()
    with atomic_write(path, concurrent=True) as partial:
        partial.write_bytes(text)
        # Never older than the shard, whose time may be in the future: it would count as stale.
        newest = max(partial.stat().st_mtime_ns, shard.stat().st_mtime_ns)
        os.utime(partial, ns=(newest, newest))
