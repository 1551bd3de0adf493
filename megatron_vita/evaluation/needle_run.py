"""Run of a grid of needles, lengths x depths, and its report."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_vita.evaluation.answering import Answerer, Reply
from megatron_vita.evaluation.grading import same_digits
from megatron_vita.evaluation.heat_map import draw_heat_map
from megatron_vita.evaluation.needles import LONGEST_ANSWER, Cell, Haystack
from megatron_vita.evaluation.results import ResultLog, Row, Task, describe_refused, run_tasks
from megatron_vita.inference.requests.types import SamplingParams

WRONG_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class NeedleGrid:
    """Lengths in pages, depths from 0 to 1, and number of needles per cell.

    `tokens`: tokens of a prompt by number of pages, where known.
    """

    pages: Sequence[int]
    depths: Sequence[float]
    needles: int
    tokens: Mapping[int, int] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Return all questions, short haystacks first, questions of one haystack together."""
        # Short ones first show early whether anything works. Questions of one haystack together let
        # an engine reuse what it computed for their common prefix.
        return [
            Cell(pages=pages, depth=depth, trial=trial)
            for pages in self.pages
            for trial in range(self.needles)
            for depth in self.depths
        ]


def run_needles(
    answerer: Answerer, *, haystack: Haystack, grid: NeedleGrid, folder: Path, model: str
) -> dict[str, Any]:
    """Answer the questions missing in `folder`, and write and return its report with a heat map."""
    # Results made with other settings must not be mixed into one report: the log refuses them.
    settings = _settings(haystack, grid, model)
    log = ResultLog(folder / "needles.jsonl", settings=settings)

    def task(cell: Cell) -> Task:
        needle = haystack.needle(cell, depths=grid.depths)

        def row(reply: Reply) -> Row:
            right = same_digits(reply.text, needle.code)
            graded = {
                "code": needle.code,
                "answer": reply.text,
                "right": right,
                "prompt_tokens": reply.prompt_tokens,
            }
            return {**asdict(cell), "page": cell.page, "name": needle.name, **graded}

        return Task(
            key=cell.key,
            prompt=lambda: haystack.prompt(cell, depths=grid.depths),
            row=row,
            work=cell.pages,
        )

    rows = run_tasks(
        [task(cell) for cell in grid.cells()],
        answerer=answerer,
        log=log,
        sampling=SamplingParams(max_new_tokens=LONGEST_ANSWER),
        title="needles",
        unit="page",
    )
    return write_report(rows, settings=settings, grid=grid, folder=folder)


def write_report(
    rows: Sequence[Row], *, settings: Row, grid: NeedleGrid, folder: Path
) -> dict[str, Any]:
    """Write report.json, report.md and heat_map.png from all rows of a grid; return the report."""
    lengths = [_length(pages, rows, grid) for pages in grid.pages]
    report = {
        "right": sum(row["right"] for row in rows),
        "asked": len(rows),
        "refused": sum("error" in row for row in rows),
        "refused_prompts": _refused(rows),
        "lengths": lengths,
        "depths": list(grid.depths),
        "shares": [
            [_share(rows, length["pages"], depth) for length in lengths] for depth in grid.depths
        ],
        "settings": settings,
        "wrong": [row for row in rows if not row["right"]][:WRONG_SHOWN],
    }
    (folder / "report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    draw_heat_map(
        folder / "heat_map.png",
        shares=report["shares"],
        lengths=[_label(length) for length in lengths],
        depths=grid.depths,
        title=f"{settings['model']}: {report['right']} of {report['asked']} codes found",
    )
    return report


def _settings(haystack: Haystack, grid: NeedleGrid, model: str) -> Row:
    """Return everything that results depend on, except lengths and trials, which may be added
    later."""
    text = hashlib.sha256("\n".join(haystack.book.lines).encode()).hexdigest()[:16]
    return {
        "model": model,
        "seed": haystack.seed,
        "media": haystack.media,
        "shared": haystack.shared,
        "text": text,
        "depths": list(grid.depths),
        **asdict(haystack.book.style),
    }


def _length(pages: int, rows: Sequence[Row], grid: NeedleGrid) -> Row:
    """Return a column: its pages, and the tokens of its prompts.

    Tokens are the median of those reported by the answerer, else the grid's.
    """
    reported = [
        row["prompt_tokens"]
        for row in rows
        if row["pages"] == pages and row["prompt_tokens"] is not None
    ]
    tokens = grid.tokens.get(pages)
    # Prompts of one column differ by the tokens of a name.
    if reported:
        tokens = int(statistics.median(reported))
    return {"pages": pages, "tokens": tokens}


# Every cell has rows: `run_tasks` returns one for each of its questions.
def _share(rows: Sequence[Row], pages: int, depth: float) -> float:
    rights = [row["right"] for row in rows if row["pages"] == pages and row["depth"] == depth]
    return sum(rights) / len(rights)


def _label(length: Row) -> str:
    """Format a length: 512, 32K, 1M tokens (of 1024), and the pages."""
    tokens = length["tokens"]
    pages = "1 page"
    if length["pages"] > 1:
        pages = f"{length['pages']:,} pages"
    if tokens is None:
        return pages
    # Haystacks are filled with whole pages, and so end a little short of a round number.
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= 0.99 * size:
            return f"{tokens / size:.3g}{unit}\n{pages}"
    return f"{tokens}\n{pages}"


def _refused(rows: Sequence[Row]) -> list[Row]:
    return [
        {"name": f"{row['pages']} pages, depth {row['depth']:.0%}", "error": row["error"]}
        for row in rows
        if "error" in row
    ]


def _markdown(report: dict[str, Any]) -> str:
    heads = [_label(length).replace("\n", ", ") for length in report["lengths"]]
    lines = [
        "# Needles in a haystack of pages",
        "",
        f"{report['right']} of {report['asked']} codes found.",
        "",
        *describe_refused(report["refused_prompts"], consequence="their codes count as not found"),
        "",
        "![Share of codes found](heat_map.png)",
        "",
        f"| depth | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for depth, shares in zip(report["depths"], report["shares"], strict=True):
        lines.append(f"| {depth:.0%} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [
        f"| {name} | {value} |" for name, value in report["settings"].items() if name != "depths"
    ]
    if report["wrong"]:
        lines += [
            "",
            "Not found (the first):",
            "",
            "| pages | depth | code | answer |",
            "|---|---|---|---|",
        ]
    for row in report["wrong"]:
        # Bars and line breaks would end the cell of the table.
        shown = row.get("error") or row["answer"]
        cell = " ".join(shown.replace("|", "\\|").split())[:80]
        lines.append(f"| {row['pages']} | {row['depth']:.0%} | {row['code']} | {cell} |")
    return "\n".join(lines) + "\n"
