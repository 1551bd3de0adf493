"""Scores of all stages and seeds as rows, a row for each stage, test and length."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.four_stages.heldout import SWAPPED
from examples.four_stages.run_folder import STAGES, RunFolder
from examples.four_stages.score import TESTS
from megatron_vita.files import atomic_write
from megatron_vita.report.reading import read_run

Row = dict[str, Any]


def rows_of(run_folder: RunFolder) -> Iterator[Row]:
    """Yield the scores of one seed: stage, test, tokens of a prompt (of needles), score, control, and
    number of questions."""
    for stage in STAGES:
        folder = run_folder.scores(stage)
        for test in TESTS:
            yield from _question_rows(stage, test, folder)
        yield from _needle_rows(stage, folder)


def _question_rows(stage: int, test: str, folder: Path) -> Iterator[Row]:
    report = _report(folder / test)
    control = _report(folder / (test + SWAPPED))
    if report is None:
        return
    for name, share in {"all": report["all"], **report["groups"]}.items():
        other = control and {"all": control["all"], **control["groups"]}[name]["share"]
        yield {
            "stage": stage,
            "test": f"{test}: {name}",
            "tokens": None,
            "score": share["share"],
            "control": other,
            "questions": share["asked"],
        }


def _needle_rows(stage: int, folder: Path) -> Iterator[Row]:
    lengths = sorted(int(path.name) for path in (folder / "needles").glob("*"))
    for tokens in lengths:
        report = _report(folder / "needles" / str(tokens))
        control = _report(folder / f"needles{SWAPPED}" / str(tokens))
        if report is not None:
            yield {
                "stage": stage,
                "test": "needle",
                "tokens": tokens,
                "score": report["right"] / report["asked"],
                "control": control and control["right"] / control["asked"],
                "questions": report["asked"],
            }


def _report(folder: Path) -> Row | None:
    path = folder / "report.json"
    if not path.exists():
        return None
    report: Row = json.loads(path.read_text(encoding="utf-8"))
    return report


def merge_seeds(runs: Sequence[RunFolder]) -> list[Row]:
    """Merge the rows of several seeds: means, and each seed's score for its spread."""
    groups: dict[tuple, list[tuple[int, Row]]] = defaultdict(list)
    for run in runs:
        for row in rows_of(run):
            groups[row["stage"], row["test"], row["tokens"]].append((run.seed, row))
    merged = []
    for (stage, test, tokens), rows in groups.items():
        controls = [row["control"] for _, row in rows if row["control"] is not None]
        merged.append(
            {
                "stage": stage,
                "test": test,
                "tokens": tokens,
                "score": _mean([row["score"] for _, row in rows]),
                "control": _mean(controls),
                "seeds": {str(seed): row["score"] for seed, row in rows},
                "questions": rows[0][1]["questions"],
            }
        )
    return merged


def _mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return sum(values) / len(values)


def cost_rows(run_folder: RunFolder) -> Iterator[Row]:
    """Yield what the training of each stage took, from the records of its run."""
    for stage in STAGES:
        if not run_folder.steps_done(stage):
            continue
        record = read_run(run_folder.checkpoints(stage))
        seconds = [value for _, value in record.series("speed/step_seconds")]
        speeds = sorted(value for _, value in record.series("speed/tokens_per_second"))
        yield {
            "stage": stage,
            "steps": len(record.steps),
            "minutes": sum(seconds) / 60,
            "tokens_per_second": speeds[len(speeds) // 2],
            "loss": record.series("train/loss")[-1][1],
        }


def write_results(path: Path, runs: Sequence[RunFolder]) -> None:
    """Write rows of scores and of costs as JSON."""
    result = {
        "scores": merge_seeds(runs),
        "training": [{"seed": run.seed, **row} for run in runs for row in cost_rows(run)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
