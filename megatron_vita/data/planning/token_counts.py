"""Lengths of the documents of an index, from metadata alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.samples.records import Kind
from megatron_vita.data.samples.truncation import Piece
from megatron_vita.data.shards.index import SampleIndex
from megatron_vita.media.video import VideoInfo


@dataclass(frozen=True)
class Lengths:
    """Counts for each sample of an index, int64: tokens, tiles, tokens with loss; raw texts and
    pairs are marked."""

    tokens: np.ndarray
    tiles: np.ndarray
    loss_tokens: np.ndarray
    is_text: np.ndarray
    is_pair: np.ndarray


def document_lengths(index: SampleIndex, *, encoder: SampleEncoder) -> Lengths:
    """Count tokens, tiles and tokens with loss of each sample of an index.

    A sample longer than a pack is counted as truncated, or whole if nothing would remain. Raw text
    is counted whole, since it is split over packs; and so is a pair, which is never cut.
    """
    kinds, counts = index.ragged("piece_kinds")
    tokens = index.ragged("piece_tokens")[0].astype(np.int64)
    tiles = np.zeros_like(tokens)
    for kind, measured in (
        (Kind.IMAGE, _measure_images(index, encoder)),
        (Kind.VIDEO, _measure_videos(index, encoder)),
    ):
        # Pieces of media are in the order of the index's images and videos.
        tokens[kinds == kind] = measured[:, 0]
        tiles[kinds == kind] = measured[:, 1]
    first = np.cumsum(counts) - counts
    is_pair = _pad_pairs(kinds, tokens, counts=counts, encoder=encoder)
    scored = np.where(kinds == Kind.LOSS, tokens, 0)
    # The first token of a document has none before it that could predict it.
    opens_scored = np.zeros(len(index), dtype=np.int64)
    filled = counts > 0
    opens_scored[filled] = kinds[first[filled]] == Kind.LOSS
    sums = [_sum_by_sample(values, counts) for values in (tokens, tiles, scored)]
    is_text = index.column("is_text")
    found = Lengths(sums[0], sums[1], sums[2] - opens_scored, is_text, is_pair)
    if not encoder.limit:
        return found
    for sample in np.flatnonzero((found.tokens > encoder.limit) & ~is_text & ~is_pair):
        pieces = slice(first[sample], first[sample] + counts[sample])
        values = zip(
            kinds[pieces].tolist(), tokens[pieces].tolist(), tiles[pieces].tolist(), strict=True
        )
        if (left := encoder.truncate([Piece(Kind(k), n, t) for k, n, t in values])) is not None:
            found.tokens[sample] = left.tokens
            found.tiles[sample] = left.tiles
            found.loss_tokens[sample] = left.loss_tokens
    return found


def _pad_pairs(
    kinds: np.ndarray, tokens: np.ndarray, *, counts: np.ndarray, encoder: SampleEncoder
) -> np.ndarray:
    """Set the tokens of the boundaries of pairs; returns which samples are pairs."""
    boundaries = np.flatnonzero(kinds == Kind.BOUNDARY)
    samples = np.searchsorted(np.cumsum(counts), boundaries, side="right")
    is_pair = np.zeros(len(counts), dtype=bool)
    is_pair[samples] = True
    before = np.concatenate([[0], np.cumsum(tokens)])
    chosen = before[boundaries] - before[(np.cumsum(counts) - counts)[samples]]
    tokens[boundaries] = encoder.boundary(chosen)
    return is_pair


def _measure_images(index: SampleIndex, encoder: SampleEncoder) -> np.ndarray:
    """Tokens and tiles of all images of an index: [images, 2]."""
    sizes = np.stack([index.ragged(name)[0] for name in ("image_widths", "image_heights")], axis=1)
    return _by_distinct(sizes, lambda size: encoder.measure_image((int(size[0]), int(size[1]))))


def _measure_videos(index: SampleIndex, encoder: SampleEncoder) -> np.ndarray:
    """Tokens and frames of all videos of an index: [videos, 2]."""
    columns = [index.ragged(name)[0] for name in ("video_durations", "video_fps", "video_frames")]
    infos = np.stack([column.astype(np.float64) for column in columns], axis=1)
    return _by_distinct(
        infos, lambda v: encoder.measure_video(VideoInfo(duration=v[0], fps=v[1], frames=int(v[2])))
    )


def _by_distinct(values: np.ndarray, measure: Callable[[Any], tuple[int, int]]) -> np.ndarray:
    """Apply `measure` to each row, once for each distinct row."""
    if not len(values):
        return np.zeros((0, 2), dtype=np.int64)
    # Media of a dataset mostly have a few sizes: measuring each row would take most of the time.
    distinct, inverse = np.unique(values, axis=0, return_inverse=True)
    measured = np.array([measure(value) for value in distinct.tolist()], dtype=np.int64)
    return measured[inverse.reshape(-1)]


def _sum_by_sample(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    stops = np.cumsum(counts, dtype=np.int64)
    return totals[stops] - totals[stops - counts]
