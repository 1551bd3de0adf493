"""Held-out questions: chat JSONL whose last assistant turn is the reference answer."""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vita.data.samples.foreign import sample_of
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.evaluation.answering import Answerer, Reply
from megatron_vita.evaluation.grading import METRICS
from megatron_vita.evaluation.results import ResultLog, Row, Task, describe_refused, run_tasks
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.text.conversation import TextPart, check_messages

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A question: turns before the answer, media files, reference answer, and group ("" for
    none)."""

    messages: list[dict[str, Any]]
    images: list[Path]
    videos: list[Path]
    reference: str
    group: str

    def prompt(self) -> Prompt:
        """Build the prompt, with the content of its media.

        Raises:
            DataError: a file cannot be read.
        """
        return Prompt(
            messages=self.messages,
            images=[MediaFile.read(path) for path in self.images],
            videos=[MediaFile.read(path) for path in self.videos],
        )


class HeldOutSet(NamedTuple):
    """The questions of a file, and a line with file and line number for each rejected sample."""

    questions: list[HeldOut]
    rejected: list[str]


def read_questions(path: Path, *, media: Path, group: str | None) -> HeldOutSet:
    """Read all questions of a chat JSONL; samples that are invalid or have no answer are rejected.

    Args:
        path: the JSONL.
        media: folder that relative media paths start from.
        group: field of the samples to group scores by; None for no groups.

    Raises:
        DataError: the file cannot be read or has no question.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    # Lines are counted with the empty ones, as editors do.
    found = HeldOutSet([], [])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.questions.append(_question(line, media=media, group=group))
        except DataError as error:
            found.rejected.append(f"{path}:{number}: {error}")
            logger.warning("%s", found.rejected[-1])
    if not found.questions:
        raise DataError(f"{path} has no questions{_first_of(found.rejected)}")
    return found


def _first_of(rejected: Sequence[str]) -> str:
    if not rejected:
        return ""
    return f"; {len(rejected)} samples are rejected, the first: {rejected[0]}"


def _question(line: bytes, *, media: Path, group: str | None) -> HeldOut:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}: a sample is a JSON object with messages")
    sample = sample_of(record, prompt=None)
    turns = check_messages(sample)
    if group is not None and group not in record:
        raise DataError(f"no field {group}, by which answers are grouped, among {sorted(record)}")
    # Earlier assistant turns belong to the question.
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    if last != len(turns) - 1 or last == 0:
        raise DataError(
            f"the roles are {[turn.role for turn in turns]}: a question and last its answer are needed"
        )
    reference = "".join(
        part.text for part in turns[last].parts if isinstance(part, TextPart)
    ).strip()
    if not reference:
        raise DataError("the last assistant turn is empty: it must hold the right answer")
    name_of_group = ""
    if group is not None:
        name_of_group = str(record[group])
    return HeldOut(
        messages=sample["messages"][:last],
        images=[media / file for file in sample.get("images", [])],
        videos=[media / file for file in sample.get("videos", [])],
        reference=reference,
        group=name_of_group,
    )


def run_questions(
    answerer: Answerer,
    held_out: HeldOutSet,
    *,
    metric: str,
    folder: Path,
    max_new_tokens: int,
    settings: Row,
) -> dict[str, Any]:
    """Answer the questions missing in `folder`, write answers.jsonl and the report, and return
    it."""
    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; known: {', '.join(METRICS)}")
    log = ResultLog(
        folder / "answers.jsonl", settings=settings | {"max_new_tokens": max_new_tokens}
    )

    def task(index: int, question: HeldOut) -> Task:
        def row(reply: Reply) -> Row:
            answered = {"answer": reply.text.strip(), "reference": question.reference}
            return {
                "question": question.messages[-1]["content"],
                "group": question.group,
                **answered,
            }

        return Task(key=str(index), prompt=question.prompt, row=row)

    rows = run_tasks(
        [task(index, question) for index, question in enumerate(held_out.questions)],
        answerer=answerer,
        log=log,
        sampling=SamplingParams(max_new_tokens=max_new_tokens),
        title="questions",
        unit="question",
    )
    return write_report(
        rows, rejected=held_out.rejected, metric=metric, folder=folder, settings=settings
    )


def write_report(
    rows: Sequence[Row], *, rejected: Sequence[str], metric: str, folder: Path, settings: Row
) -> dict[str, Any]:
    """Write and return report.json and report.md: scores by group and over all; rejected samples."""
    rights = [METRICS[metric](row["answer"], row["reference"]) for row in rows]
    groups: dict[str, list[bool]] = defaultdict(list)
    for row, right in zip(rows, rights, strict=True):
        groups[row["group"]].append(right)
    groups.pop("", None)
    report = {
        "metric": metric,
        "refused": sum("error" in row for row in rows),
        "rejected": list(rejected),
        "refused_prompts": _refused(rows),
        "all": _score(rights),
        "groups": {name: _score(of_group) for name, of_group in groups.items()},
        "settings": settings,
    }
    (folder / "report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    return report


def _refused(rows: Sequence[Row]) -> list[Row]:
    return [
        {"name": f"question {number} ({row['question']:.80})", "error": row["error"]}
        for number, row in enumerate(rows, start=1)
        if "error" in row
    ]


def _score(rights: Sequence[bool]) -> Row:
    return {"right": sum(rights), "asked": len(rights), "share": sum(rights) / len(rights)}


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Held-out questions ({report['metric']})",
        "",
        "| group | right | asked | share |",
        "|---|---|---|---|",
    ]
    for name, score in (("**all**", report["all"]), *report["groups"].items()):
        lines.append(
            f"| {name} | {score['right']} | {score['asked']} | {100 * score['share']:.1f} % |"
        )
    refused = describe_refused(report["refused_prompts"], consequence="they count as wrong")
    lines += ["", *refused]
    if report["rejected"]:
        lines += [
            "",
            f"{len(report['rejected'])} samples are no questions, and were not asked:",
            "",
        ]
        lines += [f"* {reason}" for reason in report["rejected"]]
    return "\n".join(lines) + "\n"
