"""Progress of work on disk, so that an interrupted run continues."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.workers.pool import Work, WorkerOptions, run_tasks
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import append_json_lines, complete_lines, write_json_lines


class ProgressFile:
    """Progress file: JSONL with the stamp of the work, then a line for each finished part.

    A torn last line is skipped.

    Raises:
        ConfigError: the file has finished parts of other work; names the field that differs.
        DataError: the file is damaged.
    """

    def __init__(self, path: Path, *, stamp: dict[str, Any]) -> None:
        self._path = path
        entries = _read(path)
        if len(entries) > 1 and entries[0] != stamp:
            field = next(name for name in stamp if entries[0].get(name) != stamp[name])
            raise ConfigError(
                f"{path}: it is of work with another {field} ({entries[0].get(field)!s:.200}, "
                f"now {stamp[field]!s:.200}); choose another output or delete this one"
            )
        # A stamp without finished parts binds nobody: other work may begin.
        if len(entries) <= 1:
            entries = [stamp]
        write_json_lines(path, entries)
        self.finished: dict[int, Any] = {entry["part"]: entry["result"] for entry in entries[1:]}

    def run(
        self, work: Work, tasks: dict[int, Any], *, options: WorkerOptions, total: int, unit: str
    ) -> None:
        """Run the tasks that are not finished; their results must be JSON.

        Args:
            work: the function of `run_tasks`.
            tasks: tasks by number of the part.
            options: processes and time limit.
            total: amount of work that remains, in `unit`s.
            unit: unit of the progress bar.
        """
        numbers = [number for number in tasks if number not in self.finished]
        waiting = [tasks[number] for number in numbers]
        with progress_bar(self._path.parent, total=total, unit=unit) as bar:
            for i, result in run_tasks(work, waiting, options=options, on_advance=bar.update):
                # At once: what is not in the file when the process is killed is done again.
                self.finished[numbers[i]] = result
                append_json_lines(self._path, [{"part": numbers[i], "result": result}])


def progress_bar(name: object, *, total: int, unit: str) -> "tqdm[Any]":
    """Create a progress bar with amount, rate and remaining time; bytes with their prefixes."""
    scaled = unit == "B"
    if not scaled:
        # tqdm writes the unit right after the number.
        unit = f" {unit}"
    return tqdm(
        total=total,
        desc=str(name),
        unit=unit,
        unit_scale=scaled,
        mininterval=1,
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in complete_lines(path)]
    except ValueError as error:
        raise DataError(
            f"{path}: damaged: {error}; delete it and what was made, and begin again"
        ) from error
