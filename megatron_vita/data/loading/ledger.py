"""Ledger of damaged samples, so that a resumed run masks the same samples in a pack again.

A folder holds a JSONL file for each replica, with a line for each event, on disk before the pack is
used. Checkpoints carry a copy. An event applies only to its own pack: the same pack is reproduced
even if the cause (a timeout, a storage fault) has passed, and another pack of a later epoch tries
the sample again.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_vita.errors import DataError
from megatron_vita.files import append_json_lines, complete_lines


class Damage(NamedTuple):
    """Event of a damaged document in a pack.

    The document is masked, or used with `frames` of its video frames replaced by others.
    """

    pack: int
    document: int  # index in the pack
    shard: str  # file name
    key: str
    reason: str
    frames: int = 0

    @property
    def is_masked(self) -> bool:
        """Return true if the document is masked, not used with replaced frames."""
        return not self.frames


class Ledger:
    """Known events, with new ones appended to the file `path` if there is one."""

    def __init__(self, known: Iterable[Damage] = (), *, path: Path | None = None) -> None:
        self._path = path
        self._by_pack: dict[int, dict[int, Damage]] = {}
        for damage in merge_damage(known):
            self._by_pack.setdefault(damage.pack, {})[damage.document] = damage

    def of_pack(self, pack: int) -> list[Damage]:
        """List the events of a pack."""
        return list(self._by_pack.get(pack, {}).values())

    def events(self) -> list[Damage]:
        """List all events."""
        # Copies, since the thread that agrees on packs may add events while a checkpoint is saved.
        return [
            damage for events in list(self._by_pack.values()) for damage in list(events.values())
        ]

    def add(self, damages: Iterable[Damage]) -> list[Damage]:
        """Record new events, durably if there is a file, and return those that are new.

        Masking a document that was used with replaced frames before is a new event.
        """
        new = [damage for damage in merge_damage(damages) if self._is_new(damage)]
        for damage in new:
            self._by_pack.setdefault(damage.pack, {})[damage.document] = damage
        if new and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Durable before the pack is used: a resumed run must mask the same documents.
            events = [damage._asdict() for damage in new]
            append_json_lines(self._path, events, ensure_ascii=False)
        return new

    def _is_new(self, damage: Damage) -> bool:
        known = self._by_pack.get(damage.pack, {}).get(damage.document)
        return known is None or (damage.is_masked and not known.is_masked)


def read_ledgers(folder: Path) -> list[Damage]:
    """Read the events of all files of a folder; a torn last line is skipped."""
    return [
        _parse(line, path)
        for path in sorted(folder.glob("*.jsonl"))
        for line in complete_lines(path)
    ]


def merge_damage(damages: Iterable[Damage]) -> list[Damage]:
    """Deduplicate events, sorted by pack: the first of a document, unless a later one masks it."""
    events: dict[tuple[int, int], Damage] = {}
    for damage in damages:
        known = events.setdefault((damage.pack, damage.document), damage)
        if damage.is_masked and not known.is_masked:
            events[damage.pack, damage.document] = damage
    return [events[position] for position in sorted(events)]


def add_up_damage(damages: Iterable[Damage]) -> list[Damage]:
    """Merge the events of a replica's ranks for a pack, adding up the replaced frames of a
    document."""
    met = list(damages)
    frames = Counter[tuple[int, int]]()
    for damage in met:
        frames[damage.pack, damage.document] += damage.frames
    merged = []
    for event in merge_damage(met):
        if not event.is_masked:
            event = event._replace(frames=frames[event.pack, event.document])
        merged.append(event)
    return merged


def _parse(line: bytes, path: Path) -> Damage:
    try:
        return Damage(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not a ledger of damaged samples: {error}; fix this line: {line!r}"
        ) from error
