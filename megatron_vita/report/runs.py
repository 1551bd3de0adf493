"""The page of one or several runs: what they reached, their course, restarts and data."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from megatron_vita.report.lines import Mark, Series, line_chart, number
from megatron_vita.report.page import COLORS, cards, figures, html_page, table
from megatron_vita.report.reading import RunRecord, Segment

LAST = 20
"""Steps over which the loss at the end is a mean."""
LISTED = 20
_SLOW = "speed/slow_rank"
_SLOW_PARTS = ("data", "compute", "communication")
RESTART = "#8a8f98"
OWN_PARTS = ("train", "validation", "speed", "data", "memory", "event", "step", "time")


@dataclass(frozen=True, kw_only=True)
class CaptionedPicture:
    """A picture of a run's data, with its caption."""

    run: str
    caption: str
    url: str  # data:


def write_report(
    runs: Sequence[RunRecord], out: Path, *, pictures: Sequence[CaptionedPicture] = ()
) -> None:
    """Write the page of `runs`, side by side."""
    title = " and ".join(run.name for run in runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        html_page("".join(_sections(runs, title, pictures)), title=title), encoding="utf-8"
    )


def _sections(
    runs: Sequence[RunRecord], title: str, pictures: Sequence[CaptionedPicture]
) -> Iterator[str]:
    written = time.strftime("%Y-%m-%d %H:%M")
    yield f"<header><h1>{escape(title)}</h1><p>{_lead(runs)} Written {written}.</p></header>"
    if len(runs) == 1:
        yield cards(_facts(runs[0]))
    else:
        yield f'<section class="left"><h2>Runs</h2>{_fact_table(runs)}</section>'
    yield _section("Loss", _loss_charts(runs))
    yield _section("Loss by source", _source_charts(runs))
    yield _section("Optimizer", _charts(runs, _OPTIMIZER))
    for heading, names in (("Speed", _SPEED), ("Memory", _MEMORY), ("Data", _DATA)):
        yield _section(heading, _charts(runs, names))
    yield _section("Recorded", _charts(runs, {name: name for name in _recorded(runs)}))
    yield _slow_ranks(runs)
    yield _damage(runs)
    yield _pictures(pictures)
    yield f'<section class="left"><h2>Starts</h2>{_starts(runs)}</section>'
    yield _recipes(runs)


_OPTIMIZER = {"Gradient norm": "train/grad_norm", "Learning rate": "train/lr"}
_SPEED = {
    "Tokens a second and GPU": "speed/tokens_per_second_per_gpu",
    "TFLOP/s a GPU": "speed/tflops_per_gpu",
    "Seconds of a step": "speed/step_seconds",
    "Seconds of a step that wait for data": "speed/data_seconds",
}
_MEMORY = {
    "Device memory, peak of a rank (GiB)": "memory/peak_gib",
    "Device memory, reserved (GiB)": "memory/reserved_gib",
    "Host memory of a rank (GiB)": "memory/host_gib",
}
_DATA = {"Share of packs that is not padding": "data/fill", "Loss tokens": "data/loss_tokens"}


def _lead(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        last = run.environment[-1] if run.environment else {}
        version = " ".join(filter(None, (last.get("version"), last.get("commit"))))
        devices = f"{last['ranks']} x {last['device']}" if "ranks" in last else "unknown devices"
        name = f"{run.name}: " if len(runs) > 1 else ""
        parts.append(f"{name}megatron_vita {version} on {devices}, {last.get('host', '')}.")
    return escape(" ".join(parts))


def _facts(run: RunRecord) -> dict[str, str]:
    """Summary of a run's progress: HTML by name."""
    last = max(run.steps, default=0)
    facts = {
        "state": _state(run),
        "steps": f"{last:,} of {run.total_steps:,}" if run.total_steps else f"{last:,}",
        f"loss, mean of the last {LAST} steps": _mean(run.series("train/loss")[-LAST:]),
        "lowest validation loss": _lowest(run.series("validation/loss", held_out=True)),
        "tokens": number(_total_tokens(run)),
        "tokens/s/GPU, median": _median(run, "speed/tokens_per_second_per_gpu"),
        "TFLOP/s/GPU, median": _median(run, "speed/tflops_per_gpu"),
        "waiting for data": _waiting(run),
        "peak memory of a rank": _most_memory(run),
        "damaged samples": f"{sum(value for _, value in run.series('data/damaged')):,.0f}",
        "starts": str(len(run.segments)),
        "time": _hours(sum(segment.ended - segment.began for segment in run.segments)),
    }
    return {name: value for name, value in facts.items() if value}


def _fact_table(runs: Sequence[RunRecord]) -> str:
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for found in facts for name in found))
    rows = [[name, *(found.get(name, "") for found in facts)] for name in names]
    return table(["", *(_name(runs, i) for i in range(len(runs)))], rows)


def _name(runs: Sequence[RunRecord], place: int) -> str:
    color = COLORS[place % len(COLORS)]
    return f'<i class="mark" style="background:{color}"></i>{escape(runs[place].name)}'


def _state(run: RunRecord) -> str:
    end = run.segments[-1].end
    return {"killed": "running or killed"}.get(end, end)


def _mean(points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return ""
    return f"{sum(value for _, value in points) / len(points):.4g}"


def _lowest(points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return ""
    return f"{min(value for _, value in points):.4g}"


def _middle(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return sorted(values)[len(values) // 2]


def _median(run: RunRecord, name: str) -> str:
    middle = _middle([value for _, value in run.series(name)])
    return "" if middle is None else number(middle)


def _total_tokens(run: RunRecord) -> float:
    return sum(
        row.get("speed/tokens_per_second", 0.0) * row.get("speed/step_seconds", 0.0)
        for row in run.steps.values()
    )


def _waiting(run: RunRecord) -> str:
    waits = sum(value for _, value in run.series("speed/data_seconds"))
    whole = sum(value for _, value in run.series("speed/step_seconds"))
    return f"{waits / whole:.1%}" if whole else ""


def _most_memory(run: RunRecord) -> str:
    """Peak memory of the device, or of the host in runs on CPU."""
    for name in ("memory/peak_gib", "memory/host_gib"):
        if points := run.series(name):
            return f"{max(value for _, value in points):.3g} GiB"
    return ""


def _hours(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _section(heading: str, charts: dict[str, str]) -> str:
    if not charts:
        return ""
    return f"<section><h2>{heading}</h2>{figures(charts, kind='charts plots')}</section>"


def _charts(runs: Sequence[RunRecord], names: dict[str, str]) -> dict[str, str]:
    """A chart of each metric that some run has, with a line a run."""
    charts = {}
    for caption, name in names.items():
        lines = _lines(runs, name)
        if any(line.points for line in lines):
            from_zero = name.split("/")[0] in ("speed", "memory")
            charts[escape(caption)] = line_chart(lines, from_zero=from_zero, marks=_restarts(runs))
    return charts


def _lines(runs: Sequence[RunRecord], name: str, *, held_out: bool = False) -> list[Series]:
    return [
        Series(
            name=run.name, color=COLORS[i % len(COLORS)], points=run.series(name, held_out=held_out)
        )
        for i, run in enumerate(runs)
    ]


def _restarts(runs: Sequence[RunRecord]) -> list[Mark]:
    """Return the steps at which runs resumed."""
    return [
        Mark(
            step=segment.start,
            color=COLORS[i % len(COLORS)] if len(runs) > 1 else RESTART,
            text=f"{run.name}: restarted after step {segment.start:,}",
        )
        for i, run in enumerate(runs)
        for segment in run.segments[1:]
    ]


def _loss_charts(runs: Sequence[RunRecord]) -> dict[str, str]:
    marks = _restarts(runs)
    charts = {"Training": line_chart(_lines(runs, "train/loss"), marks=marks)}
    held_out = _lines(runs, "validation/loss", held_out=True)
    if any(line.points for line in held_out):
        charts["Held-out packs"] = line_chart(held_out, marks=marks)
    return charts


def _source_charts(runs: Sequence[RunRecord]) -> dict[str, str]:
    """One run: a chart with a line a source; several: a chart a source with a line a run."""
    prefix = "train/loss/"
    names = list(
        dict.fromkeys(name for run in runs for name in run.names() if name.startswith(prefix))
    )
    if len(runs) > 1:
        return _charts(runs, {name.removeprefix(prefix): name for name in names})
    if len(names) < 2:
        return {}
    lines = [
        Series(
            name=name.removeprefix(prefix),
            color=COLORS[i % len(COLORS)],
            points=runs[0].series(name),
        )
        for i, name in enumerate(names)
    ]
    return {"Training": line_chart(lines, marks=_restarts(runs))}


def _recorded(runs: Sequence[RunRecord]) -> list[str]:
    """Names of metrics that are not the loop's own."""
    names = dict.fromkeys(name for run in runs for name in run.names())
    return [name for name in names if name.split("/")[0] not in OWN_PARTS]


def _damage(runs: Sequence[RunRecord]) -> str:
    """Number of damaged samples of each run, and the first of them."""
    parts = []
    for run in runs:
        count = sum(value for _, value in run.series("data/damaged"))
        if not count and not run.damaged:
            continue
        parts.append(
            f"<h4>{escape(run.name)}: {count:,.0f} damaged samples in the steps above</h4>"
        )
        rows = [
            [escape(str(row.get(name, ""))) for name in ("pack", "shard", "key", "reason")]
            for row in run.damaged[:LISTED]
        ]
        if rows:
            parts.append(table(["pack", "shard", "key", "reason"], rows))
    if not parts:
        return ""
    return f'<section class="left"><h2>Damaged samples</h2>{"".join(parts)}</section>'


def _slow_ranks(runs: Sequence[RunRecord]) -> str:
    """The ranks that were named as slow, and what their time went to."""
    rows = []
    for run in runs:
        for step, rank in run.series(_SLOW)[-LISTED:]:
            values = run.steps[step]
            shares = [f"{values.get(f'{_SLOW}_{part}_share', 0.0):.0%}" for part in _SLOW_PARTS]
            factor = f"{values.get(f'{_SLOW}_factor', 0.0):.2g}"
            rows.append([escape(run.name), f"{step:,}", f"{rank:.0f}", factor, *shares])
    if not rows:
        return ""
    columns = ["run", "step", "rank", "times the median", *_SLOW_PARTS]
    return f'<section class="left"><h2>Slow ranks</h2>{table(columns, rows)}</section>'


def _pictures(pictures: Sequence[CaptionedPicture]) -> str:
    if not pictures:
        return ""
    shown = "".join(
        f'<figure class="sheet"><figcaption>{escape(f"{picture.run}: {picture.caption}")}</figcaption>'
        f'<img src="{picture.url}" alt=""></figure>'
        if picture.url
        else f'<p class="none">{escape(f"{picture.run}: {picture.caption}")}</p>'
        for picture in pictures
    )
    return f"<section><h2>Samples seen</h2>{shown}</section>"


def _starts(runs: Sequence[RunRecord]) -> str:
    columns = ["run", "begun", "steps", "ended", "time", "repeated", "ranks", "host", "commit"]
    rows = [
        _start(runs, place, segment) for place, run in enumerate(runs) for segment in run.segments
    ]
    return table(columns, rows)


def _start(runs: Sequence[RunRecord], place: int, segment: Segment) -> list[str]:
    about = segment.about
    end = f"{segment.end}: {segment.error[:120]}" if segment.error else segment.end
    return [
        _name(runs, place) if len(runs) > 1 else escape(runs[place].name),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(segment.began)),
        f"{segment.start + 1:,} to {segment.last:,}" if segment.last > segment.start else "none",
        escape(end),
        _hours(segment.ended - segment.began),
        f"{segment.repeated:,} steps" if segment.repeated else "",
        escape(str(about.get("ranks", ""))),
        escape(str(about.get("host", ""))),
        escape(str(about.get("commit", ""))),
    ]


def _recipes(runs: Sequence[RunRecord]) -> str:
    """Fields in which the runs differ."""
    if len(runs) < 2:
        return ""
    fields = [dict(_flat(run.recipe)) for run in runs]
    names = dict.fromkeys(name for found in fields for name in found)
    rows = [
        [escape(name), *(f"<code>{escape(str(found.get(name, '')))}</code>" for found in fields)]
        for name in names
        if len({str(found.get(name)) for found in fields}) > 1
    ]
    if not rows:
        return ""
    head = ["field", *(_name(runs, i) for i in range(len(runs)))]
    return f'<section class="left"><h2>Recipes differ in</h2>{table(head, rows)}</section>'


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under their dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
