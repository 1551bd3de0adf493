"""Histograms and bars as SVG, to stand inside an HTML page."""

from collections.abc import Sequence
from html import escape

import numpy as np

from megatron_vita.rounding import round_up

WIDTH = 340
HEIGHT = 120
FOOT = 20
HEAD = 16
MOST_BINS = 24


def histogram(values: np.ndarray, *, unit: str, log: bool = False, top: float | None = None) -> str:
    """A histogram of values of at least 0; `log` makes each bin wider by one factor, `top` is where
    the axis ends."""
    if not len(values):
        return '<p class="none">none</p>'
    edges = _doubling_edges(values) if log else _even_edges(values, top)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    step = WIDTH / len(counts)
    most = max(int(counts.max()), 1)
    bars = "".join(
        f'<rect class="bar" x="{i * step + 0.5:.1f}" width="{max(step - 1, 1):.1f}" '
        f'y="{HEAD + (HEIGHT - bar):.1f}" height="{bar:.1f}"><title>{_number(edges[i])} to {_number(edges[i + 1])} '
        f"{unit}: {count:,}</title></rect>"
        for i, count in enumerate(counts.tolist())
        if (bar := max(HEIGHT * count / most, 1.5 if count else 0))
    )
    marks = "".join(
        f'<text x="{i * step:.1f}" y="{HEAD + HEIGHT + 14}" text-anchor="{_anchor(i, len(counts))}">'
        f"{_number(edge)}</text>"
        for i, edge in enumerate(edges)
        if i % _marked(len(counts)) == 0
    )
    return (
        f'<svg viewBox="-6 0 {WIDTH + 12} {HEIGHT + HEAD + FOOT}" role="img">'
        f'<text class="most" x="0" y="11">{most:,}</text>{bars}'
        f'<line x1="0" x2="{WIDTH}" y1="{HEAD + HEIGHT}" y2="{HEAD + HEIGHT}"/>{marks}</svg>'
    )


def stacked_bar(shares: dict[str, float], colors: Sequence[str]) -> str:
    """One bar that is divided as the shares are, with a legend below."""
    whole = sum(shares.values()) or 1
    parts = [
        (name, value / whole, colors[i % len(colors)])
        for i, (name, value) in enumerate(shares.items())
    ]
    pieces = "".join(
        f'<span style="width:{100 * share:.3f}%;background:{color}" title="{escape(name)}: {share:.1%}"></span>'
        for name, share, color in parts
    )
    legend = "".join(
        f'<li><i style="background:{color}"></i>{escape(name)} <b>{share:.1%}</b></li>'
        for name, share, color in parts
    )
    return f'<div class="stack">{pieces}</div><ul class="legend">{legend}</ul>'


def _doubling_edges(values: np.ndarray) -> np.ndarray:
    """From a power of two to another; between them as many bins as make about a dozen in all."""
    low = np.floor(np.log2(max(float(values.min()), 1)))
    high = np.floor(np.log2(max(float(values.max()), 1))) + 1
    finer = next(n for n in (8, 4, 2, 1) if n * (high - low) <= MOST_BINS or n == 1)
    return 2.0 ** (np.arange(finer * (high - low) + 1) / finer + low)


def _even_edges(values: np.ndarray, top: float | None) -> np.ndarray:
    if top is not None:
        return np.linspace(0, top, MOST_BINS + 1 - 4)
    width = max(1, int(np.ceil((values.max() + 1) / MOST_BINS)))
    bins = int(values.max()) // width + 1
    return np.arange((bins if bins <= 8 else round_up(bins, 6)) + 1) * width


def _marked(bins: int) -> int:
    """Every how many edges one is named: those that divide the axis in at most eight."""
    return next(n for n in (1, 2, 3, 4, 5, 6, 7, 8, bins) if bins % n == 0 and bins // n <= 8)


def _anchor(place: int, bins: int) -> str:
    if place == 0:
        return "start"
    return "end" if place == bins else "middle"


def _number(value: float) -> str:
    for limit, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= limit and value % limit == 0:
            return f"{value / limit:g}{suffix}"
    if value < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"
