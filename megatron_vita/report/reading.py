"""A run's folder as data: metrics over all of its starts, without what was repeated."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.config.parsing.yaml_file import read_yaml, resolved
from megatron_vita.config.run_files import ENVIRONMENT, LEDGERS, METRICS, RECIPE
from megatron_vita.errors import DataError

Row = dict[str, Any]


@dataclass(kw_only=True)
class Segment:
    """The part of a run from one start to its end."""

    start: int  # steps done before
    lowest: int  # step after which all were done by this part: `start`, or that of a rollback
    began: float  # seconds since the epoch
    ended: float
    last: int  # last step that it did
    repeated: int = 0  # steps that the next start has taken back
    end: str = "killed"  # or running, stopped, error, done
    error: str = ""
    about: Row = field(default_factory=dict)


@dataclass(kw_only=True)
class RunRecord:
    """Records of a run, each step once."""

    name: str
    folder: Path
    steps: dict[int, Row]
    faults: dict[int, Row]  # by step; those that a rule has stopped the run for are no steps
    validations: dict[int, Row]
    segments: list[Segment]
    recipe: Row
    environment: list[Row]  # of each start
    damaged: list[Row]

    def series(self, name: str, *, held_out: bool = False) -> list[tuple[int, float]]:
        """(step, value) of all steps, or validations, that have a value of `name`."""
        rows = self.validations if held_out else self.steps
        return [
            (step, row[name]) for step, row in sorted(rows.items()) if row.get(name) is not None
        ]

    def names(self) -> list[str]:
        """Names of all values of steps, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.steps.values() for name in row))

    @property
    def total_steps(self) -> int:
        """Steps that the recipe asks for; 0 where it is not known."""
        return int(self.recipe.get("training", {}).get("train_iters", 0))


def read_run(folder: Path) -> RunRecord:
    """Read the records in a run's folder.

    Raises:
        DataError: there is no `metrics.jsonl`, or nothing in it.
    """
    path = folder / METRICS
    try:
        # Bytes: a text would also be split at line separators inside of strings.
        rows = list(_parse(path.read_bytes().splitlines()))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}: a run's folder is needed (training.run_dir, or else checkpoint.save)"
        ) from error
    if not rows:
        raise DataError(f"{path}: no whole line in it yet")
    steps, faults, validations, segments = _replay(rows)
    recipe = folder / RECIPE
    # Two parts, since folders of runs are often named alike, such as checkpoints.
    return RunRecord(
        name="/".join(folder.resolve().parts[-2:]),
        folder=folder,
        steps=steps,
        faults=faults,
        validations=validations,
        segments=segments,
        recipe=resolved(read_yaml(recipe, what="recipe")) if recipe.exists() else {},
        environment=list(_lines(folder / ENVIRONMENT)),
        damaged=[
            row for file in sorted((folder / LEDGERS).glob("*.jsonl")) for row in _lines(file)
        ],
    )


def _lines(path: Path) -> Iterator[Row]:
    if path.exists():
        yield from _parse(path.read_bytes().splitlines())


def _parse(lines: Iterable[bytes]) -> Iterator[Row]:
    """Rows of the complete lines; a line that a kill has torn is skipped."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _replay(
    rows: list[Row],
) -> tuple[dict[int, Row], dict[int, Row], dict[int, Row], list[Segment]]:
    """Steps, faults, validations and segments. A start or rollback takes back what came after its
    step."""
    steps: dict[int, Row] = {}
    faults: dict[int, Row] = {}
    validations: dict[int, Row] = {}
    segments: list[Segment] = []
    for row in rows:
        event = row.get("event")
        step = int(row.get("step", 0))
        if event == "start" or not segments:
            segments.append(_begin(row, step, segments))
        if event in ("start", "rollback"):
            # These steps were done again, or never counted.
            for known in (steps, faults, validations):
                for later in [number for number in known if number > step]:
                    del known[later]
        segment = segments[-1]
        segment.ended = row.get("time", segment.ended)
        if event == "rollback":
            segment.lowest = min(segment.lowest, step)
        elif event == "step":
            steps[step] = row
            segment.last = step
        elif event == "fault":
            faults[step] = row
        elif event == "validation":
            validations[step] = row
        elif event in _ENDS:
            segment.end = _ENDS[event]
            segment.error = row.get("error", "")
    return steps, faults, validations, segments


_ENDS = {"stop": "stopped", "error": "error", "end": "done"}


def _begin(row: Row, step: int, segments: list[Segment]) -> Segment:
    if segments:
        segments[-1].repeated = max(0, segments[-1].last - step)
    now = row.get("time", 0.0)
    return Segment(start=step, lowest=step, began=now, ended=now, last=step, about=row)
