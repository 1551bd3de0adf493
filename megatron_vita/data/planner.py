"""Makes pack plans: a pure function of indexes and recipe."""

from typing import NamedTuple

import numpy as np

from megatron_vita.config import DataConfig, Recipe
from megatron_vita.data.batch import padded_length
from megatron_vita.data.documents import document_lengths, newline_length
from megatron_vita.data.index import index_path, read_index
from megatron_vita.data.packing import Shuffler, pack_windows, sample_order
from megatron_vita.data.plan import COLUMNS, PackPlan
from megatron_vita.data.split import Source, Split, find_sources, plan_stamp
from megatron_vita.errors import DataError
from megatron_vita.text.tokenizer import Tokenizer


class Rejected(NamedTuple):
    """A sample that a plan leaves out, and why."""

    split: str
    dataset: str
    shard: str
    key: str
    reason: str


def make_plan(
    recipe: Recipe, split: Split, *, tokenizer: Tokenizer, strict: bool = False
) -> tuple[PackPlan, list[Rejected]]:
    """Plans a split: `data.epochs` shuffled epochs of the training data, one of the validation data as it lies.

    Gives also the samples left out because they are longer than a pack, or have media that a text-only model cannot
    take; with `strict` the first of them is a DataError. DataError if none is left.
    """
    sources = find_sources(recipe, split, tokenizer=tokenizer)
    documents = _document_table(recipe, sources, tokenizer)
    data = recipe.data
    lengths = padded_length(documents["tokens"], data.padding_multiple)
    usable = lengths <= data.seq_length
    if recipe.model.text_only:
        usable &= documents["tiles"] == 0
    rejected = _rejected(split, sources, documents, usable=usable, seq_length=data.seq_length)
    first = f"{rejected[0].shard} sample {rejected[0].key}: {rejected[0].reason}" if rejected else ""
    if strict and rejected:
        raise DataError(first)
    if not usable.any():
        raise DataError(f"data.{split}: none of its {len(usable)} samples can be used. {first}")
    parts: list[dict[str, np.ndarray]] = []
    for epoch in range(data.epochs if split == "train" else 1):
        shuffler = Shuffler((data.seed, epoch) if split == "train" else None)
        order, packs = _pack_epoch(sources, lengths, usable=usable, data=data, shuffler=shuffler)
        first_pack = int(parts[-1]["pack"][-1]) + 1 if parts else 0
        parts.append({"pack": first_pack + packs} | {name: documents[name][order] for name in COLUMNS[1:]})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    stamp = plan_stamp(recipe, split, tokenizer=tokenizer, sources=sources)
    return PackPlan(columns, stamp=stamp), rejected


def _pack_epoch(
    sources: list[Source], lengths: np.ndarray, *, usable: np.ndarray, data: DataConfig, shuffler: Shuffler
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch's usable samples in pack order, and the pack of each, from 0."""
    sizes = [[header.samples for header in source.headers] for source in sources]
    samples = sample_order(sizes, ratios=[source.ratio for source in sources], shuffler=shuffler)
    samples = samples[usable[samples]]
    order, packs = pack_windows(
        lengths[samples], capacity=data.seq_length, window=data.shuffle_window, shuffler=shuffler
    )
    return samples[order], packs


def _document_table(recipe: Recipe, sources: list[Source], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """A column for each of the plan's, with a value for each sample of the datasets' shards laid end to end."""
    newline = newline_length(tokenizer)
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype=np.int64)] for name in COLUMNS[1:]}
    for dataset, source in enumerate(sources):
        for shard, path in enumerate(source.shards):
            index = read_index(index_path(path))
            tokens, tiles = document_lengths(
                index, media=recipe.media, vision=recipe.model.vision, newline_length=newline
            )
            rows = np.arange(len(index))
            values = (np.full_like(rows, dataset), np.full_like(rows, shard), rows, tokens, tiles)
            for name, value in zip(COLUMNS[1:], values, strict=True):
                columns[name].append(value)
    return {name: np.concatenate(values) for name, values in columns.items()}


def _rejected(
    split: str, sources: list[Source], documents: dict[str, np.ndarray], *, usable: np.ndarray, seq_length: int
) -> list[Rejected]:
    rejected = []
    for sample in np.flatnonzero(~usable):
        source = sources[documents["dataset"][sample]]
        path = source.shards[documents["shard"][sample]]
        key = read_index(index_path(path)).row(int(documents["row"][sample])).key
        tokens, tiles = documents["tokens"][sample], documents["tiles"][sample]
        reason = f"{tokens} tokens do not fit data.seq_length {seq_length}"
        if tokens <= seq_length:
            reason = f"has images or videos ({tiles} tiles), which model.text_only cannot take"
        rejected.append(Rejected(split, source.name, str(path), key, reason))
    return rejected
