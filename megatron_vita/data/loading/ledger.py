"""The ledger: which samples could not be read, so that a resumed run masks in a pack what was
masked in it before.

A folder holds a JSONL file for each replica, with a line for each event, on disk before the pack is
used. Checkpoints
carry a copy. A replay obeys events of the same pack only: whatever struck a sample once (a time
limit, a storage fault) strikes again there, and another pack of another epoch tries the sample
anew.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_vita.errors import DataError


class Damage(NamedTuple):
    """A document of a pack that cannot be read, and why."""

    pack: int
    document: int  # place in the pack
    shard: str  # file name
    key: str
    reason: str


class Ledger:
    """Known events, and where new ones are written; nowhere without a `path`."""

    def __init__(self, known: Iterable[Damage] = (), *, path: Path | None = None) -> None:
        self._path = path
        self._by_pack: dict[int, dict[int, Damage]] = {}
        for damage in known:
            self._by_pack.setdefault(damage.pack, {}).setdefault(damage.document, damage)

    def of_pack(self, pack: int) -> list[Damage]:
        """The events of a pack."""
        return list(self._by_pack.get(pack, {}).values())

    def events(self) -> list[Damage]:
        """All events."""
        return [
            damage for events in list(self._by_pack.values()) for damage in list(events.values())
        ]

    def add(self, damages: Iterable[Damage]) -> None:
        """Notes events that are new, and writes them to the disk."""
        new = [
            damage
            for damage in damages
            if damage.document not in self._by_pack.get(damage.pack, {})
        ]
        for damage in new:
            self._by_pack.setdefault(damage.pack, {})[damage.document] = damage
        if new and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self._path)
            with open(self._path, "a") as file:
                file.writelines(
                    json.dumps(damage._asdict(), ensure_ascii=False) + "\n" for damage in new
                )
                file.flush()
                os.fsync(file.fileno())


def read_ledgers(folder: Path) -> list[Damage]:
    """The events of all files of a folder. A last line that was torn by a kill is passed over."""
    return [
        _parse(line, path)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def merge_damage(damages: Iterable[Damage]) -> list[Damage]:
    """Events without repetitions, by pack."""
    events: dict[tuple[int, int], Damage] = {}
    for damage in damages:
        events.setdefault((damage.pack, damage.document), damage)
    return [events[place] for place in sorted(events)]


def _cut_torn_line(path: Path) -> None:
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _parse(line: bytes, path: Path) -> Damage:
    try:
        return Damage(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not a ledger of damaged samples: {error}; mend this line: {line!r}"
        ) from error
