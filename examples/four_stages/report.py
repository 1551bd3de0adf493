"""Report of the four stages: a single self-contained HTML file."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure

from examples.figures import png_url, svg
from examples.four_stages.results import Row, cost_rows, merge_seeds
from examples.four_stages.run_folder import STAGES, RunFolder
from megatron_vita.evaluation.heat_map import draw_heat_map
from megatron_vita.files import complete_lines
from megatron_vita.report.reading import read_run

CARDS = 24
LONG_DOCUMENT = 24  # media of a sample, above which no card shows it
TITLES = {1: "alignment", 2: "general questions", 3: "32K to 128K", 4: "256K to 512K"}


def write_report(path: Path, runs: Sequence[RunFolder]) -> None:
    """Write the report of one or more seeds; the first one gives curves, heat maps and samples."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape()
    )
    environment.globals["percent"] = percent
    environment.globals["length"] = length
    rows = merge_seeds(runs)
    page = environment.get_template("report.html.jinja").render(
        titles=TITLES,
        seeds=[run.seed for run in runs],
        costs=list(cost_rows(runs[0])),
        losses=svg(_loss_figure(runs[0])),
        tests=_by_test(rows),
        needles=_needle_table(rows),
        heat_maps=dict(_heat_maps(runs[0])),
        cards=_cards(runs[0]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def percent(share: float | None) -> str:
    """Format a share; a dash for one that is not known."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} %"


def length(tokens: int) -> str:
    """Format a number of tokens: 128K, 1M."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


def _by_test(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Scores of questions by test, then by stage, with the spread over seeds."""
    tests: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["tokens"] is None:
            shares = list(row["seeds"].values())
            tests[row["test"]][row["stage"]] = row | {"spread": max(shares) - min(shares)}
    return tests


def _needle_table(rows: Sequence[Row]) -> dict[int, dict[int, Row]]:
    """Needles by length in tokens, then by stage."""
    needles: dict[int, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["tokens"] is not None:
            needles[row["tokens"]][row["stage"]] = row
    return dict(sorted(needles.items()))


def _loss_figure(run: RunFolder) -> Figure:
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for stage, axes in zip(STAGES, figure.subplots(1, len(STAGES)), strict=True):
        axes.set(title=f"stage {stage}: {TITLES[stage]}", xlabel="step", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        if run.steps_done(stage):
            points = read_run(run.checkpoints(stage)).series("train/loss")
            axes.plot([step for step, _ in points], [loss for _, loss in points], color="#1f6feb")
    return figure


def _heat_maps(run: RunFolder) -> Iterator[tuple[int, str]]:
    """Yield each stage with the heat map of all lengths that were asked after it, as a data URL."""
    for stage in STAGES:
        reports = _needle_reports(run.scores(stage) / "needles")
        if not reports:
            continue
        path = run.scores(stage) / "heat_map.png"
        columns = [[shares[0] for shares in report["shares"]] for report in reports.values()]
        draw_heat_map(
            path,
            shares=[list(row) for row in zip(*columns, strict=True)],
            lengths=[
                f"{length(tokens)}\n{report['lengths'][0]['pages']:,} frames"
                for tokens, report in reports.items()
            ],
            depths=next(iter(reports.values()))["depths"],
            title=f"after stage {stage}",
        )
        yield stage, png_url(path.read_bytes())


def _needle_reports(folder: Path) -> dict[int, dict[str, Any]]:
    paths = {int(path.parent.name): path for path in folder.glob("*/report.json")}
    return {tokens: json.loads(paths[tokens].read_text()) for tokens in sorted(paths)}


def _cards(run: RunFolder) -> list[dict[str, Any]]:
    """Questions about images with the answers of the last stage: a seeded sample, wrong answers as
    frequent as they are."""
    stage = max(
        (s for s in STAGES if (run.scores(s) / "short" / "report.json").exists()), default=0
    )
    if not stage:
        return []
    answers = _rows(run.scores(stage) / "short" / "answers.jsonl")
    answered = {int(row["key"]): row for row in answers}
    samples = list(enumerate(_rows(run.tests / "short.jsonl")))
    shown = [
        (index, sample)
        for index, sample in samples
        if index in answered and 0 < len(sample.get("images", [])) <= LONG_DOCUMENT
    ]
    chosen = random.Random(0).sample(shown, min(CARDS, len(shown)))
    return [_card(run.tests, sample, answered[index]) for index, sample in chosen]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in complete_lines(path)]


def _card(tests: Path, sample: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    picture = (tests / "media" / sample["images"][0]).read_bytes()
    return {
        "picture": png_url(picture),
        "question": sample["messages"][0]["content"].replace("<image>", "").strip(),
        "answer": row["answer"],
        "right": row["reference"],
        "kind": sample["kind"],
        "pages": len(sample["images"]),
    }
