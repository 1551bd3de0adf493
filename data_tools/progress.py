"""What of a piece of work is finished, on disk, so that an interrupted run goes on where it
stopped."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.pool import Crew, Work, run_tasks
from megatron_vita.errors import ConfigError, DataError


class Progress:
    """A JSONL file: the stamp (what the work is made of), then a line for each finished part, in
    the order they ended.

    ConfigError if the file tells of finished parts of other work, naming the field; DataError if it
    is damaged. A torn last line is passed over.
    """

    def __init__(self, path: Path, *, stamp: dict[str, Any]) -> None:
        self._path = path
        entries = list(_whole_lines(path)) if path.exists() else []
        if len(entries) > 1 and entries[0] != stamp:
            field = next(name for name in stamp if entries[0].get(name) != stamp[name])
            raise ConfigError(
                f"{path}: it tells of work with another {field} ({entries[0].get(field)!s:.200}, "
                f"now {stamp[field]!s:.200}); choose another output or delete this one"
            )
        entries = entries if len(entries) > 1 else [stamp]
        write_lines(path, entries)
        self.finished: dict[int, Any] = {entry["part"]: entry["result"] for entry in entries[1:]}

    def run(self, work: Work, tasks: dict[int, Any], *, crew: Crew, total: int, unit: str) -> None:
        """Does the tasks that are not finished, whose results JSON must hold; `total` of `unit`s
        are ahead."""
        numbers = [number for number in tasks if number not in self.finished]
        waiting = [tasks[number] for number in numbers]
        with (
            progress_bar(self._path.parent, total=total, unit=unit) as bar,
            open(self._path, "a") as file,
        ):
            for place, result in run_tasks(work, waiting, crew=crew, on_advance=bar.update):
                self.finished[numbers[place]] = result
                _append(file, [{"part": numbers[place], "result": result}])


def progress_bar(name: object, *, total: int, unit: str) -> "tqdm[Any]":
    """Amount done, rate and time left; bytes in their multiples."""
    scaled = unit == "B"
    return tqdm(
        total=total,
        desc=str(name),
        unit=unit if scaled else f" {unit}",
        unit_scale=scaled,
        mininterval=1,
    )


def write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file under a temporary name, then renames it."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        _append(file, entries)
    os.replace(partial, path)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):
                yield json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path}: damaged: {error}; delete it and what was made, and begin again"
        ) from error


def _append(file: Any, entries: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(entry) + "\n" for entry in entries)
    file.flush()
