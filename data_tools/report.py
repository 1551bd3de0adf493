"""Report on a recipe's data as one self-contained HTML file."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from data_tools.previews import previews
from data_tools.statistics import (
    DatasetStatistics,
    DataStatistics,
    PlanStatistics,
    collect_statistics,
)
from megatron_vita.config import Recipe
from megatron_vita.report.charts import histogram, stacked_bar
from megatron_vita.report.page import COLORS, cards, figures, html_page, table
from megatron_vita.sizes import counted
from megatron_vita.text.vocabulary import open_tokenizer

REASONS = 8
COLUMNS = [
    *("dataset", "split", "samples", "in an epoch", "tokens", "mean length", "median", "longest"),
    *("images", "downscaled", "videos", "video hours", "tiles", "loss tokens", "left out"),
    "rejected",
]


def write_report(recipe: Recipe, *, title: str, out: Path, samples: int) -> DataStatistics:
    """Write the report on a recipe's datasets, with `samples` previews of each.

    Raises:
        DataError: an index is missing.
    """
    statistics = collect_statistics(recipe, open_tokenizer(recipe))
    body = "".join(_sections(recipe, statistics, title=title, samples=samples))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html_page(body, title=title), encoding="utf-8")
    return statistics


def _sections(
    recipe: Recipe, statistics: DataStatistics, *, title: str, samples: int
) -> Iterator[str]:
    train = [found for found in statistics.datasets if found.split == "train"]
    yield f"<header><h1>{escape(title)}</h1><p>{_lead(recipe, train)}</p></header>"
    yield _cards(train, statistics.plans)
    yield "<section><h2>Mix of an epoch, by tokens</h2>"
    yield stacked_bar({found.name: found.epoch_tokens for found in train}, COLORS) + "</section>"
    yield f"<section><h2>Datasets</h2>{table(COLUMNS, [_row(found) for found in statistics.datasets])}</section>"
    for plan in statistics.plans:
        yield _plan(plan, recipe.data.seq_length)
    for found in statistics.datasets:
        yield _dataset(found, samples)


def _lead(recipe: Recipe, train: list[DatasetStatistics]) -> str:
    media = recipe.media
    return (
        f"{counted(len(train), 'dataset')} to train on, in packs of {recipe.data.seq_length:,} tokens. "
        f"Images: at most {counted(media.max_tiles, 'tile')}. "
        f"Videos: at most {media.max_fps:g} frames per second, {media.max_frames} per video."
    )


def _cards(train: list[DatasetStatistics], plans: list[PlanStatistics]) -> str:
    tokens = sum(float(found.tokens.sum()) for found in train)
    with_loss = sum(float(found.loss_tokens.sum()) for found in train)
    values = {
        "samples": f"{sum(found.samples for found in train):,}",
        "samples in an epoch": f"{sum(found.taken for found in train):,}",
        "tokens": _large(tokens),
        "tiles": _large(sum(float(found.tiles.sum()) for found in train)),
        "tokens with loss": f"{with_loss / max(tokens, 1):.1%}",
    }
    for plan in plans:
        if plan.split == "train":
            values |= {
                "packs planned": f"{len(plan.fill):,}",
                "fill of the packs": f"{plan.fill.mean():.2%}",
            }
    return cards(values)


def _row(found: DatasetStatistics) -> list[str]:
    # A dataset without samples is shown with zeros, which have a mean and a maximum.
    tokens = found.tokens
    if not found.samples:
        tokens = np.zeros(1, dtype=np.int64)
    left_out = ""
    if found.left_out:
        left_out = f"{found.left_out:,}"
    return [
        escape(found.name),
        found.split,
        f"{found.samples:,}",
        f"{found.taken:,}",
        _large(float(tokens.sum())),
        f"{tokens.mean():,.0f}",
        f"{np.median(tokens):,.0f}",
        f"{tokens.max():,}",
        f"{found.images.sum():,}",
        f"{found.downscaled:.1%}" if found.images.any() else "",
        f"{found.videos.sum():,}",
        f"{found.seconds.sum() / 3600:,.2f}",
        _large(float(found.tiles.sum())),
        f"{found.loss_tokens.sum() / max(int(tokens.sum()), 1):.1%}",
        left_out,
        f"{found.rejected.total:,}" if found.rejected.total else "",
    ]


def _plan(plan: PlanStatistics, seq_length: int) -> str:
    charts = {
        f"Fill of {counted(len(plan.fill), 'pack')} (mean {plan.fill.mean():.2%})": histogram(
            100 * plan.fill, unit="%", top=100
        ),
        "Documents in a pack": histogram(plan.documents, unit="documents"),
        "Tiles in a pack": histogram(plan.tiles, unit="tiles"),
    }
    lead = (
        f"{plan.tokens:,} tokens in packs of {seq_length:,}; "
        f"{plan.loss_tokens / max(plan.tokens, 1):.1%} of them carry loss."
    )
    shares = stacked_bar({name: float(count) for name, count in plan.shares.items()}, COLORS)
    return f"<section><h2>Plan: {plan.split}</h2><p>{lead}</p>{shares}{figures(charts)}</section>"


def _dataset(found: DatasetStatistics, samples: int) -> str:
    charts = {"Tokens of a sample": histogram(found.tokens, unit="tokens", log=True)}
    if found.tiles.any():
        charts["Tiles of a sample"] = histogram(
            found.tiles, unit="tiles", log=bool(found.tiles.max() > 64)
        )
    if len(found.seconds):
        charts["Seconds of a video"] = histogram(found.seconds, unit="seconds", log=True)
    charts["Tokens with loss in a sample"] = histogram(found.loss_tokens, unit="tokens", log=True)
    shown = ""
    if samples:
        shown = f'<div class="samples">{"".join(previews(found, samples))}</div>'
    shards = (
        f"{counted(found.samples, 'sample')} in {len(found.source.shards):,} .tar, "
        f"ratio {found.source.ratio:g}"
    )
    heading = f"<h2>{escape(found.name)} <small>{found.split}; {shards}</small></h2>"
    return f"<section>{heading}{figures(charts)}{_rejections(found)}{shown}</section>"


def _rejections(found: DatasetStatistics) -> str:
    """Samples that import and shard rejected, by reason."""
    rejected = found.rejected
    if not rejected.total:
        return ""
    lines = "".join(
        f"<li><b>{count:,}</b> {escape(reason)} <small>{escape(example)}</small></li>"
        for reason, count, example in rejected.reasons[:REASONS]
    )
    more = len(rejected.reasons) - REASONS
    if more > 0:
        lines += f"<li>and {counted(more, 'more reason')}</li>"
    share = rejected.total / (rejected.total + found.samples + found.left_out)
    heading = f"{counted(rejected.total, 'sample')} ({share:.1%}) rejected before the index"
    return f'<div class="rejected"><h3>{heading}</h3><ul>{lines}</ul></div>'


def _large(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:,.0f}"
