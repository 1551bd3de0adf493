"""The ledger: which samples could not be read as they are, so that a resumed run masks in a pack
what was masked in it before.

A folder holds a JSONL file for each replica, with a line for each event, on disk before the pack is
used. Checkpoints
carry a copy. A replay obeys events of the same pack only: whatever struck a sample once (a time
limit, a storage fault) strikes again there, and another pack of another epoch tries the sample
anew.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_vita.errors import DataError


class Damage(NamedTuple):
    """A document of a pack that cannot be read as it is, and why: it is masked, or used though
    `frames` of its videos' frames stand for damaged ones."""

    pack: int
    document: int  # place in the pack
    shard: str  # file name
    key: str
    reason: str
    frames: int = 0

    @property
    def is_masked(self) -> bool:
        """Whether nothing of the document is used."""
        return not self.frames


class Ledger:
    """Known events, and where new ones are written; nowhere without a `path`."""

    def __init__(self, known: Iterable[Damage] = (), *, path: Path | None = None) -> None:
        self._path = path
        self._by_pack: dict[int, dict[int, Damage]] = {}
        for damage in merge_damage(known):
            self._by_pack.setdefault(damage.pack, {})[damage.document] = damage

    def of_pack(self, pack: int) -> list[Damage]:
        """The events of a pack."""
        return list(self._by_pack.get(pack, {}).values())

    def events(self) -> list[Damage]:
        """All events."""
        return [
            damage for events in list(self._by_pack.values()) for damage in list(events.values())
        ]

    def add(self, damages: Iterable[Damage]) -> list[Damage]:
        """Notes events that are new, writes them to the disk, a line each, and gives them.

        A document that was used with damaged frames and is masked now is a new event.
        """
        new = [damage for damage in merge_damage(damages) if self._is_new(damage)]
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
        return new

    def _is_new(self, damage: Damage) -> bool:
        known = self._by_pack.get(damage.pack, {}).get(damage.document)
        return known is None or (damage.is_masked and not known.is_masked)


def read_ledgers(folder: Path) -> list[Damage]:
    """The events of all files of a folder. A last line that was torn by a kill is passed over."""
    return [
        _parse(line, path)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def merge_damage(damages: Iterable[Damage]) -> list[Damage]:
    """Events without repetitions, by pack: the first of each document, unless a later one masks
    it."""
    events: dict[tuple[int, int], Damage] = {}
    for damage in damages:
        known = events.setdefault((damage.pack, damage.document), damage)
        if damage.is_masked and not known.is_masked:
            events[damage.pack, damage.document] = damage
    return [events[place] for place in sorted(events)]


def add_up_damage(damages: Iterable[Damage]) -> list[Damage]:
    """What the readers of the parts of a pack have met, as one event for each document: frames of
    its parts are added up."""
    met = list(damages)
    frames = Counter[tuple[int, int]]()
    for damage in met:
        frames[damage.pack, damage.document] += damage.frames
    return [
        event if event.is_masked else event._replace(frames=frames[event.pack, event.document])
        for event in merge_damage(met)
    ]


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
