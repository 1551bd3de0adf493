"""Histograms and bars as SVG for an HTML page."""

import itertools
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from megatron_vita.rounding import round_up

WIDTH = 340
HEIGHT = 120
FOOT = 20
HEAD = 16
MOST_BINS = 24
MOST_MARKS = 9


def histogram(values: np.ndarray, *, unit: str, log: bool = False, top: float | None = None) -> str:
    """Draw a histogram of values of at least 0.

    Args:
        values: one for each item.
        unit: unit of the values, for the titles of bars.
        log: widen each bin by a constant factor.
        top: end of the axis; None: the largest value.
    """
    if not len(values):
        return '<p class="none">none</p>'
    if log:
        edges = _doubling_edges(values)
    else:
        edges = _even_edges(values, top)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    step = WIDTH / len(counts)
    most = max(int(counts.max()), 1)
    # A bar of a few items among many would be invisible: it gets a minimum height.
    heights = np.where(counts, np.maximum(HEIGHT * counts / most, 1.5), 0).tolist()
    bars = "".join(
        f'<rect class="bar" x="{i * step + 0.5:.1f}" width="{max(step - 1, 1):.1f}" '
        f'y="{HEAD + (HEIGHT - bar):.1f}" height="{bar:.1f}">'
        f"<title>{_number(edges[i])} to {_number(edges[i + 1])} {unit}: {count:,}</title></rect>"
        for i, (count, bar) in enumerate(zip(counts.tolist(), heights, strict=True))
        if count
    )
    marks = "".join(
        f'<text x="{i * step:.1f}" y="{HEAD + HEIGHT + 14}" text-anchor="{_anchor(i, len(counts))}">'
        f"{_number(edges[i])}</text>"
        for i in (_doubling_marks(edges) if log else _even_marks(len(counts)))
    )
    return (
        f'<svg viewBox="-6 0 {WIDTH + 12} {HEIGHT + HEAD + FOOT}" role="img">'
        f'<text class="most" x="0" y="11">{most:,}</text>{bars}'
        f'<line x1="0" x2="{WIDTH}" y1="{HEAD + HEIGHT}" y2="{HEAD + HEIGHT}"/>{marks}</svg>'
    )


def stacked_bar(shares: dict[str, float], colors: Sequence[str]) -> str:
    """Draw one bar divided by shares, with a legend."""
    whole = sum(shares.values()) or 1
    parts = [
        (name, value / whole, colors[i % len(colors)])
        for i, (name, value) in enumerate(shares.items())
    ]
    pieces = "".join(
        f'<span style="width:{100 * share:.3f}%;background:{color}" '
        f'title="{escape(name)}: {share:.1%}"></span>'
        for name, share, color in parts
    )
    legend = "".join(
        f'<li><i style="background:{color}"></i>{escape(name)} <b>{share:.1%}</b></li>'
        for name, share, color in parts
    )
    return f'<div class="stack">{pieces}</div><ul class="legend">{legend}</ul>'


def _doubling_edges(values: np.ndarray) -> np.ndarray:
    """Edges from one power of two to another. Each doubling is divided evenly, so that edges are
    whole numbers, into as many bins as make about two dozen in all."""
    low = int(np.floor(np.log2(max(float(values.min()), 1))))
    high = int(np.floor(np.log2(max(float(values.max()), 1)))) + 1
    finer = next(n for n in (8, 4, 2, 1) if n * (high - low) <= MOST_BINS or n == 1)
    parts = [
        np.linspace(2**power, 2 ** (power + 1), min(finer, 2**power), endpoint=False)
        for power in range(low, high)
    ]
    return np.concatenate([*parts, [2.0**high]])


def _doubling_marks(edges: np.ndarray) -> list[int]:
    """The edges that are named: as many as there is room for, and if not all, the roundest."""
    places = range(len(edges))
    powers = [i for i in places if float(np.log2(edges[i])).is_integer()]
    halves = [i for i in places if i in powers or float(np.log2(edges[i] / 1.5)).is_integer()]
    candidates = (list(places), halves, *(powers[::apart] for apart in range(1, len(powers) + 1)))
    return next(marks for marks in candidates if len(marks) <= MOST_MARKS)


def _even_edges(values: np.ndarray, top: float | None) -> np.ndarray:
    if top is not None:
        return np.linspace(0, top, MOST_BINS + 1 - 4)
    least = (float(values.max()) + 1) / MOST_BINS
    width = next(width for width in _round_widths() if width >= least)
    bins = int(values.max()) // width + 1
    # Above 8 bins not every edge is labelled: a multiple of 6 divides into labelled intervals.
    if bins > 8:
        bins = round_up(bins, 6)
    return np.arange(bins + 1) * width


def _round_widths() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    for power in itertools.count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)


def _even_marks(bins: int) -> range:
    """The edges that are named: those that divide the axis evenly, in at most eight parts."""
    apart = next(n for n in (1, 2, 3, 4, 5, 6, 7, 8, bins) if bins % n == 0 and bins // n <= 8)
    return range(0, bins + 1, apart)


def _anchor(place: int, bins: int) -> str:
    if place == 0:
        return "start"
    if place == bins:
        return "end"
    return "middle"


def _number(value: float) -> str:
    # Edges of logarithmic axes are powers of two, which binary prefixes name in round numbers.
    for limit, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= limit and value % limit == 0:
            return f"{value / limit:g}{suffix}"
    if value < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"
