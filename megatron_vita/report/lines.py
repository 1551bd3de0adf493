"""Lines over steps as SVG, to stand inside an HTML page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH = 520
HEIGHT = 190
LEFT = 52
RIGHT = 18
FOOT = 22
HEAD = 8
MOST_POINTS = 260
FEW_POINTS = 60
"""Shorter lines are not smoothed."""
HOVERED = 52


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values over steps."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A step at which something happened to a run."""

    step: float
    color: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Mapping of a chart's values to pixels of its area."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Pixels of a point; values beyond the axis lie on its edge."""
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT), HEAD + (1 - min(max(up, 0), 1)) * HEIGHT


def line_chart(
    lines: Sequence[Series], *, from_zero: bool = False, marks: Sequence[Mark] = ()
) -> str:
    """A chart of lines over one axis of steps, with a legend where there are several.

    Noisy lines are drawn faint, and smoothed over them. The axis leaves out the most extreme
    hundredth of values on each side. Marks are dashed across its whole height.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return '<p class="none">no values</p>'
    frame = _frame(drawn, from_zero)
    paths = "".join(_paths(_thin(line, frame), frame) for line in drawn)
    return (
        f'<svg viewBox="0 0 {WIDTH + RIGHT} {HEIGHT + HEAD + FOOT}" role="img">{_grid(frame)}{paths}'
        f"{_hover(drawn, frame)}{_marks(marks, frame)}</svg>"
        f"{legend(drawn) if len(drawn) > 1 else ''}"
    )


def legend(lines: Sequence[Series]) -> str:
    """Names beside their colors."""
    entries = "".join(
        f'<li><i style="background:{line.color}"></i>{escape(line.name)}</li>' for line in lines
    )
    return f'<ul class="legend">{entries}</ul>'


def number(value: float) -> str:
    """A value in few characters: 0.00123, 1.25, 340, 1.2M, 3e-05."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if size >= limit:
            scale = {"G": 1e9, "M": 1e6, "K": 1e3}[suffix]
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


def _frame(lines: Sequence[Series], from_zero: bool) -> _Frame:
    steps = [step for line in lines for step, _ in line.points]
    values = np.array([value for line in lines for _, value in line.points])
    low, high = np.percentile(values, [1, 99]) if len(values) > FEW_POINTS else _ends(values)
    if from_zero:
        low = min(0.0, low)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    bottom = low if from_zero and low >= 0 else low - margin
    first = min(steps)
    last = max(steps)
    return _Frame(x=(first, last if last > first else first + 1), y=(bottom, high + margin))


def _ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _thin(line: Series, frame: _Frame) -> Series:
    """At most `MOST_POINTS`, each the mean of neighbours. Values end at the axis, so that a single
    one far beyond does not draw its neighbours along."""
    points = np.array(line.points, dtype=float)
    points[:, 1] = points[:, 1].clip(*frame.y)
    groups = np.array_split(points, min(len(points), MOST_POINTS))
    means = [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]
    return Series(name=line.name, color=line.color, points=means)


def _paths(line: Series, frame: _Frame) -> str:
    if len(line.points) < 2:
        x, y = frame.place(*line.points[0])
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}"/>'
    if len(line.points) < FEW_POINTS:
        return _path(line, line.points, frame, "line")
    return _path(line, line.points, frame, "faint") + _path(
        line, _smoothed(line.points), frame, "line"
    )


def _path(line: Series, points: Sequence[tuple[float, float]], frame: _Frame, kind: str) -> str:
    places = " ".join("{:.1f},{:.1f}".format(*frame.place(*point)) for point in points)
    return f'<polyline class="{kind}" stroke="{line.color}" points="{places}"/>'


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a window of a twentieth of the line, centered."""
    values = np.array([value for _, value in points])
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low = np.maximum(places - half, 0)
    high = np.minimum(places + half + 1, len(values))
    means = (sums[high] - sums[low]) / (high - low)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def _grid(frame: _Frame) -> str:
    parts = []
    for value in _ticks(*frame.y, most=5):
        _, y = frame.place(frame.x[0], value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for step in _ticks(*frame.x, most=7):
        if step != int(step):
            continue
        x, _ = frame.place(step, frame.y[0])
        parts.append(
            f'<text x="{x:.1f}" y="{HEAD + HEIGHT + 15}" text-anchor="middle">{number(step)}</text>'
        )
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{HEAD + HEIGHT}" y2="{HEAD + HEIGHT}"/>')
    return "".join(parts)


def _ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers between two values: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _hover(lines: Sequence[Series], frame: _Frame) -> str:
    """Strips that name the values at their steps."""
    width = (WIDTH - LEFT) / HOVERED
    edges = np.linspace(*frame.x, HOVERED + 1)
    strips = []
    for i in range(HOVERED):
        found = [
            text
            for line in lines
            if (text := _values_between(line, edges[i], edges[i + 1], is_last=i == HOVERED - 1))
        ]
        if found:
            strips.append(
                f'<rect class="hover" x="{LEFT + i * width:.1f}" y="{HEAD}" width="{width:.1f}" '
                f'height="{HEIGHT}"><title>{escape("; ".join(found))}</title></rect>'
            )
    return "".join(strips)


def _marks(marks: Sequence[Mark], frame: _Frame) -> str:
    """Dashed lines at the marks' steps, after the strips so that their own titles show."""
    drawn = []
    for mark in marks:
        if frame.x[0] <= mark.step <= frame.x[1]:
            x, _ = frame.place(mark.step, frame.y[0])
            drawn.append(
                f'<line class="mark" stroke="{mark.color}" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD}" '
                f'y2="{HEAD + HEIGHT}"><title>{escape(mark.text)}</title></line>'
            )
    return "".join(drawn)


def _values_between(line: Series, low: float, high: float, *, is_last: bool) -> str:
    inside = [
        (step, value)
        for step, value in line.points
        if low <= step < high or (is_last and step == high)
    ]
    if not inside:
        return ""
    step = inside[-1][0]
    mean = sum(value for _, value in inside) / len(inside)
    return f"{line.name}, step {step:g}: {number(mean)}"
