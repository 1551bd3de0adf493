"""The list of a shard's samples that must not be used, beside it: `train-000000.quarantine.json`.
Nothing is deleted.

`index` lists what it cannot read, `validate` what cannot be decoded; an index leaves out what the
list names, so no plan and no run meets it.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True, order=True)
class Entry:
    """A sample left out, by whom (`index` or `validate`) and why; no key stands for the rest of the
    tar."""

    by: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    """The list for a shard of `shard_size` bytes; `validated` says how all of it was decoded, if it
    was."""

    shard_size: int
    entries: list[Entry] = field(default_factory=list)
    validated: dict[str, Any] | None = None

    def stamp(self) -> str:
        """What tells lists of other samples apart."""
        keys = json.dumps(sorted(entry.key for entry in self.entries))
        return hashlib.sha256(keys.encode()).hexdigest()

    def replaced(
        self, by: str, entries: Iterable[Entry], *, validated: dict[str, Any] | None = None
    ) -> "Quarantine":
        """The list with other entries of one of the tools."""
        kept = [entry for entry in self.entries if entry.by != by]
        return Quarantine(
            shard_size=self.shard_size,
            entries=sorted([*kept, *entries]),
            validated=validated or self.validated,
        )


def quarantine_path(shard: Path) -> Path:
    """Where the list of a shard lies."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".quarantine.json")


def read_quarantine(shard: Path) -> Quarantine:
    """The list of a shard; an empty one where there is none, or one of an earlier shard of this
    name: of another size, or older than the shard. DataError if it is damaged.
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
    """Writes the list under a temporary name, then renames it; leaves alone a file that says the
    same.

    It is never older than the shard, whose time may lie ahead.
    """
    path = quarantine_path(shard)
    if path.exists() and read_quarantine(shard) == quarantine:
        return
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(quarantine)}, indent=1).encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text)
    newest = max(partial.stat().st_mtime_ns, shard.stat().st_mtime_ns)
    os.utime(partial, ns=(newest, newest))
    os.replace(partial, path)
