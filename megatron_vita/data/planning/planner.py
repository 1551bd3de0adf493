"""Construction of pack plans, as a pure function of indexes and recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megatron_vita.config import DataConfig, Recipe
from megatron_vita.costs.flops import forward_weights
from megatron_vita.data.datasets import Source, Split, find_sources, sample_encoder
from megatron_vita.data.planning.packing import (
    Shuffler,
    epoch_samples,
    group_by_cost,
    interleave,
    pack_windows,
    sample_order,
)
from megatron_vita.data.planning.plan import COLUMNS, PackPlan
from megatron_vita.data.planning.stamp import plan_stamp
from megatron_vita.data.planning.token_counts import document_lengths
from megatron_vita.data.shards.index import read_index
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.rounding import ceil_div, round_up
from megatron_vita.text.tokenizer_base import Tokenizer


class Rejected(NamedTuple):
    """A sample that a plan leaves out, and the reason."""

    split: str
    dataset: str
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Continuation:
    """A plan whose packs before `pack` a new plan keeps."""

    plan: PackPlan
    pack: int


def make_plan(
    recipe: Recipe,
    split: Split,
    *,
    tokenizer: Tokenizer,
    strict: bool = False,
    continued: Continuation | None = None,
) -> tuple[PackPlan, list[Rejected]]:
    """Plan a split: `data.epochs` shuffled epochs for training, one in file order for validation.

    Args:
        recipe: the recipe.
        split: "train" or "validation".
        tokenizer: the recipe's tokenizer.
        strict: raise for a sample that cannot be used, instead of leaving it out.
        continued: plan whose first packs are kept.

    Returns:
        The plan, and the samples left out: longer than a pack, or with media for a text-only model.

    Raises:
        DataError: no sample can be used, or with `strict` one cannot.
    """
    sources = find_sources(recipe, split, tokenizer=tokenizer)
    _check_ratios(sources)
    samples = _sample_table(recipe, sources, tokenizer)
    usable = _usable(recipe, samples)
    rejected = _rejected(split, sources, samples, usable=usable, recipe=recipe)
    first = ""
    if rejected:
        first = f"{rejected[0].shard} sample {rejected[0].key}: {rejected[0].reason}"
    if strict and rejected:
        raise DataError(first)
    if not usable.any():
        raise DataError(f"data.{split}: none of its {len(usable)} samples can be used. {first}")
    kept, history = _kept_packs(continued, sources)
    parts = []
    if kept:
        parts.append(kept)
    num_packs = _packs_in(kept)
    for seed in _epoch_seeds(recipe, split, continued):
        shuffler = Shuffler(seed)
        columns = _plan_epoch(
            recipe, sources, samples, usable=usable, shuffler=shuffler, first=num_packs
        )
        columns["pack"] += num_packs
        # The maximum, since an epoch may add no pack.
        num_packs = max(num_packs, _packs_in(columns))
        parts.append(columns)
    if not num_packs:
        raise DataError(
            f"data.{split}: the samples of its epochs are all longer than a pack: raise the ratios"
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    stamp = plan_stamp(recipe, split, tokenizer=tokenizer, sources=sources)
    names = [source.name for source in sources]
    return PackPlan(columns, datasets=names, stamp=stamp, history=history), rejected


def _epoch_seeds(
    recipe: Recipe, split: Split, continued: Continuation | None
) -> list[tuple[int, ...] | None]:
    """Seed of the shuffler of each epoch; None for validation, which is not shuffled."""
    if split != "train":
        return [None]
    seeds: list[tuple[int, ...] | None] = []
    for epoch in range(recipe.data.epochs):
        seed: tuple[int, ...] = (recipe.data.seed, epoch)
        if continued is not None:
            # Another seed than in the continued plan, whose packs would else come again.
            seed = (*seed, continued.pack)
        seeds.append(seed)
    return seeds


def _packs_in(columns: dict[str, np.ndarray]) -> int:
    """Number of packs up to the last one of some columns, which may be empty."""
    if columns and len(columns["pack"]):
        return int(columns["pack"][-1]) + 1
    return 0


def _check_ratios(sources: Sequence[Source]) -> None:
    """Raise ConfigError for a dataset of which an epoch has no sample."""
    for source in sources:
        samples = sum(header.samples for header in source.headers)
        if samples and not epoch_samples(samples, ratio=source.ratio, cap=source.cap):
            raise ConfigError(
                f"dataset {source.name}: ratio {source.ratio:g} of its {samples} samples is less "
                f"than one: an epoch would take none; a ratio of {1 / samples:.2g} takes one, or "
                "leave the dataset out"
            )


def _kept_packs(
    continued: Continuation | None, sources: Sequence[Source]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Columns kept from a continued plan, in the current numbers of datasets and shards; and
    history.

    A dataset or shard that the recipe no longer has, or whose content changed, becomes -1: such
    packs are already consumed, and cannot be read again.
    """
    if continued is None:
        return {}, []
    plan = continued.plan
    pack = continued.pack
    if not 0 < pack <= plan.num_packs:
        raise ConfigError(
            f"--continue-from is {pack}: the plan has {plan.num_packs} packs, the first of which can be kept"
        )
    columns = {name: column.copy() for name, column in plan.before(pack).items()}
    datasets = columns["dataset"].copy()
    shards = columns["shard"].copy()
    now = {source.name: (number, source.contents) for number, source in enumerate(sources)}
    then = {entry["name"]: entry["shards"] for entry in plan.stamp["data.train"]}
    for number, name in enumerate(plan.datasets):
        mine = datasets == number
        new_number, new_shards = now.get(name, (-1, {}))
        columns["dataset"][mine] = new_number
        columns["shard"][mine] = _renumbered(shards[mine], then=then[name], now=new_shards)
    return columns, [*plan.history, {"packs": pack, "stamp": plan.stamp}]


def _renumbered(shards: np.ndarray, *, then: dict[str, str], now: dict[str, str]) -> np.ndarray:
    """Translate shard numbers to current ones; -1 for shards that are gone, changed or were -1."""
    numbers = {name: number for number, name in enumerate(now)}
    renumbered = [-1] * len(then)
    for old, (name, content) in enumerate(then.items()):
        if now.get(name) == content:
            renumbered[old] = numbers[name]
    # The extra entry is what -1, as an index of the last one, is translated to.
    return np.array([*renumbered, -1], dtype=np.int32)[shards]


def _plan_epoch(
    recipe: Recipe,
    sources: list[Source],
    samples: dict[str, np.ndarray],
    *,
    usable: np.ndarray,
    shuffler: Shuffler,
    first: int,
) -> dict[str, np.ndarray]:
    """Columns of one epoch, with packs counted from 0; the epoch will begin at pack `first`."""
    data = recipe.data
    order = sample_order(
        [[header.samples for header in source.headers] for source in sources],
        ratios=[source.ratio for source in sources],
        caps=[source.cap for source in sources],
        shuffler=shuffler,
    )
    documents = _split_texts(samples, order[usable[order]], limit=data.seq_length)
    lengths = round_up(documents["tokens"], data.padding_multiple)
    place, packs = _pack(documents["dataset"], lengths, data=data, shuffler=shuffler)
    if data.group_by_cost:
        costs = _pack_costs(recipe, lengths[place], documents["tiles"][place], packs)
        step = recipe.training.global_batch_size
        packs = group_by_cost(
            costs, size=step, first=min(-first % step, len(costs)), shuffler=shuffler
        )[packs]
        regrouped = np.argsort(packs, kind="stable")
        place = place[regrouped]
        packs = packs[regrouped]
    return {"pack": packs} | {name: documents[name][place] for name in COLUMNS[1:]}


def _split_texts(
    samples: dict[str, np.ndarray], order: np.ndarray, *, limit: int
) -> dict[str, np.ndarray]:
    """Documents of samples taken in `order`: raw texts longer than a pack become several."""
    tokens = samples["tokens"][order]
    parts = np.where(samples["is_text"][order], ceil_div(tokens, limit), 1)
    documents = {
        name: np.repeat(samples[name][order], parts)
        for name in (*COLUMNS[1:4], "tokens", "tiles", "rows")
    }
    # Number of each document among the parts of its text, without a loop over the texts.
    part = np.arange(len(documents["tokens"])) - np.repeat(np.cumsum(parts) - parts, parts)
    whole = documents["tokens"]
    start = part * limit
    length = np.minimum(whole - start, limit)
    split = np.repeat(parts, parts) > 1
    documents["start"] = start
    documents["tokens"] = np.where(split, length, whole)
    # All tokens of a part carry loss, the last one too, since the next part follows; only the last
    # token of the text predicts nothing.
    ends_text = (start + length == whole).astype(length.dtype)
    documents["rows"] = np.where(split, length - ends_text, documents["rows"])
    return documents


def _pack(
    datasets: np.ndarray, lengths: np.ndarray, *, data: DataConfig, shuffler: Shuffler
) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents, globally or by dataset; returns documents sorted by pack, and their packs."""
    scopes = [np.arange(len(lengths))]
    if data.packing_scope == "dataset":
        scopes = [np.flatnonzero(datasets == dataset) for dataset in np.unique(datasets)]
    packed = []
    for members in scopes:
        order, packs = pack_windows(
            lengths[members],
            capacity=data.seq_length,
            window=data.shuffle_window,
            shuffler=shuffler,
        )
        packed.append((members[order], packs))
    if len(packed) == 1:
        return packed[0]
    return interleave(packed)


def _pack_costs(
    recipe: Recipe, lengths: np.ndarray, tiles: np.ndarray, packs: np.ndarray
) -> np.ndarray:
    of_square, of_tile = forward_weights(recipe)
    return np.bincount(
        packs, weights=of_square * np.square(lengths.astype(np.float64)) + of_tile * tiles
    )


def _sample_table(
    recipe: Recipe, sources: list[Source], tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Columns of the plan with a value for each sample of the datasets' shards laid end to end."""
    names = ("dataset", "shard", "row", "tokens", "tiles", "rows", "is_text", "is_pair")
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype=np.int64)] for name in names}
    for dataset, source in enumerate(sources):
        encoder = sample_encoder(recipe, tokenizer, dataset=source.config)
        for shard, path in enumerate(source.indexes):
            index = read_index(path)
            lengths = document_lengths(index, encoder=encoder)
            rows = np.arange(len(index))
            numbers = (np.full_like(rows, dataset), np.full_like(rows, shard), rows)
            counts = (lengths.tokens, lengths.tiles, lengths.loss_tokens)
            values = (*numbers, *counts, lengths.is_text, lengths.is_pair)
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
    return {name: np.concatenate(values) for name, values in columns.items()}


def _usable(recipe: Recipe, samples: dict[str, np.ndarray]) -> np.ndarray:
    # Raw text of any length is usable, since it is split over packs.
    usable = (samples["tokens"] <= recipe.data.seq_length) | samples["is_text"].astype(bool)
    usable &= samples["is_pair"].astype(bool) == (recipe.dpo.beta > 0)
    if recipe.model.text_only:
        return usable & (samples["tiles"] == 0)
    return usable


def _rejected(
    split: str,
    sources: list[Source],
    samples: dict[str, np.ndarray],
    *,
    usable: np.ndarray,
    recipe: Recipe,
) -> list[Rejected]:
    rejected = []
    # Samples come shard by shard, so that one list of keys is enough.
    keys = lru_cache(maxsize=1)(lambda index: read_index(index).keys())
    for sample in np.flatnonzero(~usable):
        source = sources[samples["dataset"][sample]]
        path = source.shards[samples["shard"][sample]]
        row_keys = keys(source.indexes[samples["shard"][sample]])
        reason = _reason({name: int(column[sample]) for name, column in samples.items()}, recipe)
        rejected.append(
            Rejected(split, source.name, str(path), row_keys[int(samples["row"][sample])], reason)
        )
    return rejected


def _reason(sample: dict[str, int], recipe: Recipe) -> str:
    """Say why a sample cannot be used."""
    is_pair = sample["is_pair"] > 0
    if is_pair and not recipe.dpo.beta:
        return "is a pair with a rejected answer, which needs dpo.beta"
    if recipe.dpo.beta and not is_pair:
        return "has no rejected answer (rejected_response), which dpo.beta needs"
    if sample["tokens"] <= recipe.data.seq_length:
        tiles = sample["tiles"]
        return f"has images or videos ({tiles} tiles), which model.text_only cannot take"
    reason = f"{sample['tokens']} tokens do not fit data.seq_length {recipe.data.seq_length}"
    if is_pair:
        reason += ", and both answers of a pair belong in one pack"
    return reason
