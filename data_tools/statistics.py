"""Statistics of a recipe's data, from indexes and plans alone: no shard is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from data_tools.rejections import Rejections, read_rejections
from megatron_vita.config import Recipe
from megatron_vita.data.datasets import Source, Split, find_sources, sample_encoder
from megatron_vita.data.planning.packing import epoch_samples
from megatron_vita.data.planning.plan import PackPlan, read_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.planning.token_counts import document_lengths
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.samples.records import Kind
from megatron_vita.data.shards.index import SampleIndex, read_index
from megatron_vita.data.shards.quarantine import read_quarantine
from megatron_vita.data.shards.storage import Location
from megatron_vita.text.tokenizer_base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Statistics of one dataset of a split.

    Arrays are int64 with a value for each sample; `seconds` has one for each video.
    """

    name: str
    split: str
    source: Source
    encoder: SampleEncoder
    tokens: np.ndarray
    tiles: np.ndarray
    loss_tokens: np.ndarray
    images: np.ndarray
    videos: np.ndarray
    seconds: np.ndarray
    downscaled: float  # share of the images that have more pixels than their tiles
    left_out: int
    rejected: Rejections  # before the index: by import and shard

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return len(self.tokens)

    @property
    def taken(self) -> int:
        """Number of samples in an epoch."""
        return epoch_samples(self.samples, ratio=self.source.ratio, cap=self.source.cap)

    @property
    def epoch_tokens(self) -> float:
        """Expected number of tokens in an epoch."""
        return float(self.tokens.sum()) * self.taken / max(self.samples, 1)


@dataclass(frozen=True, kw_only=True)
class PlanStatistics:
    """Statistics of a split's plan.

    Arrays have a value for each pack; `shares` are tokens by dataset, without datasets that are
    gone.
    """

    split: str
    fill: np.ndarray
    documents: np.ndarray
    tiles: np.ndarray
    loss_tokens: int
    tokens: int
    shares: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """Statistics of all datasets of a recipe, and of the plans that exist."""

    datasets: list[DatasetStatistics]
    plans: list[PlanStatistics]


def collect_statistics(recipe: Recipe, tokenizer: Tokenizer) -> DataStatistics:
    """Collect the statistics of a recipe's datasets and existing plans, even of outdated ones.

    Raises:
        DataError: an index is missing.
    """
    datasets = []
    plans = []
    for split in get_args(Split):
        # A recipe may have no validation data; without training data `find_sources` refuses it.
        if split == "validation" and not recipe.data.validation:
            continue
        for source in find_sources(recipe, split, tokenizer=tokenizer):
            encoder = sample_encoder(recipe, tokenizer, dataset=source.config)
            datasets.append(_of_dataset(source, split, encoder))
        if recipe.data.plan and plan_path(recipe, split).exists():
            plans.append(
                _of_plan(read_plan(plan_path(recipe, split)), split, recipe.data.seq_length)
            )
    return DataStatistics(datasets=datasets, plans=plans)


def _of_dataset(source: Source, split: str, encoder: SampleEncoder) -> DatasetStatistics:
    indexes = [read_index(path) for path in source.indexes]
    lengths = [document_lengths(index, encoder=encoder) for index in indexes]
    return DatasetStatistics(
        name=source.name,
        split=split,
        source=source,
        encoder=encoder,
        tokens=_joined([found.tokens for found in lengths]),
        tiles=_joined([found.tiles for found in lengths]),
        loss_tokens=_joined([found.loss_tokens for found in lengths]),
        images=_joined([_own(index, "image_widths")[1] for index in indexes]),
        videos=_joined([_own(index, "video_frames")[1] for index in indexes]),
        seconds=_joined([_own(index, "video_durations")[0] for index in indexes]),
        downscaled=_downscaled(indexes, encoder),
        left_out=sum(_left_out(shard) for shard in source.shards),
        rejected=read_rejections(source.shards),
    )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    # An empty array first: numpy refuses an empty list.
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _own(index: SampleIndex, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a column of the samples' media, as `SampleIndex.ragged`; a pair's, which stand in it for
    each of its conversations, once."""
    values, counts = index.ragged(name)
    kinds, pieces = index.ragged("piece_kinds")
    pairs = np.searchsorted(np.cumsum(pieces), np.flatnonzero(kinds == Kind.BOUNDARY), side="right")
    own = counts.astype(np.int64)
    own[pairs] //= 2
    place = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    return values[place < np.repeat(own, counts)], own


def _downscaled(indexes: Sequence[SampleIndex], encoder: SampleEncoder) -> float:
    """Share of the images that lose pixels: they have more than the grid that shows them."""
    names = ("image_widths", "image_heights")
    sizes = np.concatenate(
        [np.stack([_own(index, name)[0] for name in names], axis=1) for index in indexes]
    )
    # Few sizes are distinct, and choosing the grid of each of a million images takes minutes.
    distinct, counts = np.unique(sizes, axis=0, return_counts=True)
    loses = [
        width * height > encoder.pixels_shown((width, height))
        for width, height in distinct.tolist()
    ]
    return float(np.dot(loses, counts)) / max(len(sizes), 1)


def _left_out(shard: Location) -> int:
    """Number of quarantined samples, known for local shards only."""
    if isinstance(shard, Path) and shard.exists():
        return len(read_quarantine(shard).entries)
    return 0


def _of_plan(plan: PackPlan, split: str, seq_length: int) -> PlanStatistics:
    pack = plan.columns["pack"]
    tokens = plan.columns["tokens"].astype(np.int64)
    dataset = plan.columns["dataset"]
    # Datasets that the recipe no longer has are -1.
    known = dataset >= 0
    by_dataset = np.bincount(dataset[known], weights=tokens[known], minlength=len(plan.datasets))
    return PlanStatistics(
        split=split,
        fill=np.bincount(pack, weights=tokens, minlength=plan.num_packs) / seq_length,
        documents=np.bincount(pack, minlength=plan.num_packs),
        tiles=np.bincount(pack, weights=plan.columns["tiles"], minlength=plan.num_packs),
        loss_tokens=int(plan.columns["rows"].sum(dtype=np.int64)),
        tokens=plan.num_tokens,
        shares={name: int(count) for name, count in zip(plan.datasets, by_dataset, strict=True)},
    )
