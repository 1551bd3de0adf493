"""Results on disk, written line by line, so that a restarted run answers only what is missing."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.answering import Answerer, Reply
from megatron_vita.files import append_json_lines, atomic_write, complete_lines
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams

Row = dict[str, Any]
REFUSED_SHOWN = 20


class ResultLog:
    """A JSONL file of rows with keys; of rows with the same key the last counts."""

    def __init__(self, path: Path, *, settings: Mapping[str, Any] | None = None) -> None:
        """Open the log and read the rows of earlier runs.

        Args:
            path: the JSONL, created if missing.
            settings: saved beside it, to be compared by later runs.

        Raises:
            ConfigError: the settings differ from those of an earlier run.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if settings is not None:
            # Through JSON, as they are read back: tuples become lists.
            _check_settings(path.with_suffix(".settings.json"), json.loads(json.dumps(settings)))
        self._path = path
        self.rows = _read_rows(path)

    def add(self, key: str, row: Row) -> None:
        """Append a row durably."""
        # At once: a killed run loses no answer, which may have taken minutes.
        append_json_lines(self._path, [{"key": key, **row}], ensure_ascii=False)
        self.rows[key] = row

    def is_done(self, key: str) -> bool:
        """Tell whether a key has an answer; refused prompts are asked again."""
        return key in self.rows and "error" not in self.rows[key]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt, built when its turn comes, and the conversion of its reply to a row.

    `work`: units of progress.
    """

    key: str
    prompt: Callable[[], Prompt]
    row: Callable[[Reply], Row]
    work: int = 1


def run_tasks(
    tasks: Sequence[Task],
    *,
    answerer: Answerer,
    log: ResultLog,
    sampling: SamplingParams,
    title: str,
    unit: str,
) -> list[Row]:
    """Answer the tasks missing in the log, and return the rows of all tasks.

    A refused prompt's row has an `error`.
    """
    missing = [task for task in tasks if not log.is_done(task.key)]
    work = sum(task.work for task in tasks)
    # Prompts are made one by one as the answerer takes them: all at once would not fit in memory.
    with tqdm(
        total=work,
        initial=work - sum(t.work for t in missing),
        desc=title,
        unit=unit,
        smoothing=0.1,
    ) as bar:
        replies = answerer.answers((task.prompt() for task in missing), sampling=sampling)
        for task, reply in zip(missing, replies, strict=True):
            row = task.row(reply)
            if reply.error:
                row = row | {"error": reply.error}
            log.add(task.key, row)
            bar.update(task.work)
    return [log.rows[task.key] for task in tasks]


def describe_refused(prompts: Sequence[Row], *, consequence: str) -> list[str]:
    """Lines of a report on prompts that were refused: how many, and which of them (`name`) why
    (`error`), the first ones of many."""
    if not prompts:
        return ["No prompt was refused."]
    were = "prompt was" if len(prompts) == 1 else "prompts were"
    lines = [f"{len(prompts)} {were} refused; {consequence}:", ""]
    lines += [f"* {row['name']}: {row['error']}" for row in prompts[:REFUSED_SHOWN]]
    if len(prompts) > REFUSED_SHOWN:
        lines.append(f"* and {len(prompts) - REFUSED_SHOWN} more, in report.json")
    return lines


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    before = settings
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise ConfigError(
                f"{path}: the results there were made with {name} {before.get(name)!r}, and now it "
                f"is {settings.get(name)!r}: choose another folder"
            )
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _read_rows(path: Path) -> dict[str, Row]:
    """Read the rows by key; a last line that a kill tore is skipped."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(complete_lines(path), start=1):
        try:
            row = json.loads(line)
            rows[row.pop("key")] = row
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: {line!r:.80} is not a row of results: {error!r}"
            ) from error
    return rows
