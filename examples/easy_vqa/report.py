"""Report of the demo: a single self-contained HTML file."""

import random
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.easy_vqa.grade import Graded, accuracy
from examples.easy_vqa.prepare import Part, image_path
from examples.figures import png_url, svg

COLUMNS = {
    "model": ("model", "#1f6feb"),
    "swapped": ("model, images swapped", "#9cc3f5"),
    "lookup": ("image-blind lookup", "#c9ced6"),
    "majority": ("majority answer", "#e4e7ec"),
}
KINDS = ("all", "yes/no", "color", "shape")
CARDS_EACH = 18  # of right and wrong answers drawn together, by kind


def write_report(
    path: Path,
    *,
    graded: dict[str, list[Graded]],
    logs: Sequence[Path],
    parameters: int,
    part: Part,
) -> None:
    """Write the report.

    Args:
        graded: the columns of `COLUMNS`.
        logs: the TensorBoard folder of each stage.
        part: the questions that were asked.
    """
    scores = {name: accuracy(rows) for name, rows in graded.items()}
    counts = {kind: sum(kind in ("all", row.kind) for row in graded["model"]) for kind in KINDS}
    counts["all"] = len(graded["model"])
    table = [
        {"name": kind, "count": counts[kind]} | {name: scores[name][kind] for name in COLUMNS}
        for kind in KINDS
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape()
    )
    environment.globals["percent"] = lambda share: f"{100 * share:.1f} %"
    page = environment.get_template("report.html.jinja").render(
        parameters=parameters,
        questions=counts["all"],
        images=len({row.image for row in graded["model"]}),
        table=table,
        majority_answer=graded["majority"][0].answer,
        accuracy_chart=svg(_accuracy_figure(scores)),
        loss_chart=svg(_loss_figure(logs)),
        cards=_cards(graded["model"], split="test" if part == "test" else "train"),
        part=part,
    )
    path.write_text(page)


def _accuracy_figure(scores: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, (label, color)) in enumerate(COLUMNS.items()):
        places = [k + 0.2 * (i - 1.5) for k in range(len(KINDS))]
        heights = [100 * scores[name].get(kind, 0.0) for kind in KINDS]
        bars = axes.bar(places, heights, width=0.19, color=color, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set(ylabel="right answers, %", ylim=(0, 112))
    axes.legend(loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.16))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _loss_figure(logs: Sequence[Path]) -> Figure:
    figure = Figure(figsize=(10, 3.0), layout="constrained")
    for stage, (axes, folder) in enumerate(
        zip(figure.subplots(1, len(logs)), logs, strict=True), start=1
    ):
        for tag, style in (
            ("train/loss", {"color": "#9cc3f5", "lw": 1}),
            ("validation/loss", {"marker": "o"}),
        ):
            steps, values = _scalars(folder, tag)
            axes.plot(
                steps,
                values,
                label={"train/loss": "training", "validation/loss": "held out"}[tag],
                **style,
            )
        axes.set(
            title=f"stage {stage}", xlabel="step", yscale="log", ylabel="loss per scored token"
        )
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scalars(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """Points of a curve; steps repeated after an interruption are taken once."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    values = {event.step: event.value for event in events.Scalars(tag)}
    return list(values), list(values.values())


def _cards(rows: list[Graded], *, split: str) -> list[dict]:
    """Page of questions: a seeded sample of each kind, with wrong answers as frequent as they
    are."""
    draw = random.Random(0)
    chosen = [
        row
        for kind in KINDS[1:]
        for row in draw.sample([row for row in rows if row.kind == kind], CARDS_EACH)
    ]
    draw.shuffle(chosen)
    return [
        {
            "picture": png_url(image_path(split, row.image).read_bytes()),
            "image": row.image,
            "question": row.text,
            "answer": row.answer,
            "right": row.right,
        }
        for row in chosen
    ]
