"""Folder of a run: its recipe, environment, log and metrics, over all of its starts."""

import dataclasses
import json
import logging
import re
import time
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from megatron_vita.config import Recipe
from megatron_vita.config.run_files import ENVIRONMENT, LOG, RECIPE
from megatron_vita.files import cut_torn_line

_EARLIER = re.compile(r"recipe_until_step_(\d+)\.yaml")
logger = logging.getLogger(__name__)


def note_start(folder: Path, recipe: Recipe, *, step: int, environment: dict[str, Any]) -> None:
    """Write the recipe and the environment of a start of a run; called on one rank.

    The recipe of an earlier start is kept beside it where it differs, named by the step that it was
    used until.
    """
    take_back_recipes(folder, step)
    _write_recipe(folder, recipe, step)
    append_line(folder / ENVIRONMENT, {"time": time.time(), "step": step} | environment)


def _write_recipe(folder: Path, recipe: Recipe, step: int) -> None:
    text = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
    path = folder / RECIPE
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        until = earlier_recipe(folder, step)
        # If there is one, this recipe's steps are all taken back.
        if not until.exists():
            path.replace(until)
    path.write_text(text, encoding="utf-8")


def take_back_recipes(folder: Path, step: int) -> None:
    """Let the recipes of earlier starts end with `step`, after which all steps are done again.

    Of those that were used until a later one, the first was used until there; others only after.
    """
    for end in earlier_ends(folder):
        path = earlier_recipe(folder, end)
        if end <= step:
            continue
        if earlier_recipe(folder, step).exists():
            path.unlink()
        else:
            path.rename(earlier_recipe(folder, step))


def earlier_recipe(folder: Path, end: int) -> Path:
    """Return the file of the recipe that a run had until step `end`, before it was changed."""
    return folder / f"recipe_until_step_{end:08d}.yaml"


def earlier_ends(folder: Path) -> list[int]:
    """Return the last steps of a run's earlier recipes, in ascending order."""
    matches = (_EARLIER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append a line of JSON after the complete lines; a torn one is cut."""
    cut_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


class RunLog:
    """Copies the log of this process to the run's folder: `log.txt` of rank 0, and a file of each
    other rank that warns. Lines wait until the folder is known."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._handler = MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)

    def __enter__(self) -> "RunLog":
        logging.getLogger().addHandler(self._handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and error is not None:  # the console shows one line of it
            self._handler.handle(
                logging.LogRecord(
                    __name__, logging.ERROR, __file__, 0, "%s", (error,), (kind, error, trace)
                )
            )
        logging.getLogger().removeHandler(self._handler)
        if (file := self._handler.target) is not None:
            file.close()
        self._handler.close()

    def open(self, folder: Path) -> None:
        """Write the waiting lines, and all later ones."""
        name = f"log_rank_{self._rank:05d}.txt" if self._rank else LOG
        file = _LogFile(folder / name, delay=True, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handler.setTarget(file)
        self._handler.flush()
        self._handler.capacity = 1


class _LogFile(logging.FileHandler):
    """File handler that stops with one warning when a line cannot be written."""

    _is_broken = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._is_broken:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self._is_broken = True
        logger.warning(
            "%s: the log cannot be written; the run continues without it", self.baseFilename
        )
