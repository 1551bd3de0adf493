"""Rules by which checkpoints are kept, and the deletion of the others."""

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vita.checkpoint.manifest import MANIFEST, SCORES
from megatron_vita.files import atomic_write

_NAME = re.compile(r"step_(\d{8,})")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Rules of a run; a checkpoint that any of them names is kept.

    last: number of the newest.
    every: steps whose multiples are kept; 0: none.
    best: number of those with the best `metric`, the lowest or highest by `mode`.
    """

    last: int
    every: int = 0
    best: int = 0
    metric: str = ""
    mode: Literal["min", "max"] = "min"

    def prune(self, folder: Path, *, newest: Path) -> None:
        """Delete the checkpoints up to `newest` that no rule names.

        Later steps (of a run resumed from before them) and incomplete checkpoints are kept, and so
        is anything that is not named step_N, such as a copy, or is a link.
        """
        saved = sorted(path for path in folder.iterdir() if is_saved(path))
        earlier = [path for path in saved if path.name <= newest.name]
        # Incomplete ones must not count among the last: no run can resume from them.
        complete = [path.name for path in earlier if (path / MANIFEST).exists()]
        for name in self.unnamed(complete, lambda name: read_scores(folder / name)):
            remove(folder / name)

    def unnamed(self, names: list[str], scores_of: Callable[[str], dict[str, float]]) -> list[str]:
        """Return the names of checkpoints, of those in `names`, that no rule names.

        scores_of: returns the metrics of a checkpoint.
        """
        names = sorted(names)
        kept = {*names[-self.last :], *self._best(names, scores_of)}
        kept |= {name for name in names if self.every and step_of(name) % self.every == 0}
        return [name for name in names if name not in kept]

    def _best(self, names: list[str], scores_of: Callable[[str], dict[str, float]]) -> list[str]:
        if not self.best:
            return []
        scores = {name: scores_of(name).get(self.metric) for name in names}
        scored = {
            name: score
            for name, score in scores.items()
            if score is not None and math.isfinite(score)
        }
        ranked = sorted(scored, key=lambda name: scored[name], reverse=self.mode == "max")
        return ranked[: self.best]


def is_saved(path: Path) -> bool:
    """Tell whether `path` is named like a checkpoint of a run and is not a link."""
    return is_name(path.name) and not path.is_symlink()


def is_name(name: str) -> bool:
    """Tell whether a checkpoint of a run may have this name."""
    return bool(_NAME.fullmatch(name))


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(name)
    assert match, name
    return int(match[1])


def read_scores(checkpoint: Path) -> dict[str, float]:
    """Return the metrics noted for a checkpoint; none if they cannot be read."""
    try:
        scores: dict[str, float] = json.loads((checkpoint / SCORES).read_text())
    except (OSError, ValueError):
        return {}
    return scores


def note_scores(checkpoint: Path, scores: dict[str, float]) -> None:
    """Add metrics to those of a checkpoint; log a warning if they cannot be written."""
    try:
        with atomic_write(checkpoint / SCORES) as partial:
            partial.write_text(json.dumps(read_scores(checkpoint) | scores))
    except OSError as error:
        logger.warning("%s: metrics cannot be noted: %s", checkpoint, error)


def remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it; log a warning if it cannot be deleted.

    The rename first: a kill must not leave half of it under its name.
    """
    try:
        shutil.rmtree(hide(checkpoint))
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", checkpoint, error)


def hide(checkpoint: Path) -> Path:
    """Rename a checkpoint so that no run resumes from it; the next save to its folder deletes it.

    Returns:
        Its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    hidden = checkpoint.with_name(f".{checkpoint.name}.{time.time_ns()}.incomplete")
    return checkpoint.rename(hidden)
