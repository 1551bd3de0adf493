"""Packs and samples as the model sees them, as text and as a picture."""

import dataclasses
from pathlib import Path
from typing import cast, get_args

import numpy as np

from data_tools.viewing.contact_sheet import draw_sheet
from data_tools.viewing.view import PackView, describe, view_pack
from megatron_vita.config import Recipe
from megatron_vita.data.datasets import Split, sample_encoder
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import COLUMNS, PackPlan
from megatron_vita.data.planning.token_counts import document_lengths
from megatron_vita.data.shards.index import find_index, read_index, text_stamp
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.rounding import round_up
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.vocabulary import open_tokenizer
from megatron_vita.training.run.faults import read_dump


def inspect_pack(
    recipe: Recipe, split: str, pack: int, *, png: Path | None, max_height: int = 0
) -> str:
    """Describe pack number `pack`, from 1, of a split's plan, and draw it if `png` names a file.

    max_height: height in pixels after which further documents are only counted; 0: no limit.
    """
    if split not in get_args(Split):
        raise ConfigError(f"--split is {split!r}; known: {', '.join(get_args(Split))}")
    tokenizer = open_tokenizer(recipe)
    stream = open_split(recipe, split=cast(Split, split), tokenizer=tokenizer, tile_share=(0, 1))
    if not 1 <= pack <= len(stream):
        raise ConfigError(f"--pack is {pack}; the {split} plan has packs 1 to {len(stream)}")
    names = [dataset.name for dataset in getattr(recipe.data, split)]
    view = view_pack(
        stream,
        pack - 1,
        recipe=recipe,
        tokenizer=tokenizer,
        names=names,
        title=f"{split} pack {pack}",
    )
    return _show(view, png, max_height=max_height)


def inspect_fault(recipe: Recipe, path: Path, *, png: Path | None, max_height: int = 0) -> str:
    """Describe a faulty step by the report at `path`, and the pack with the worst loss.

    png, max_height: as for `inspect_pack`.
    """
    report = read_dump(path)
    unit = "tokens"
    if recipe.dpo.beta:
        unit = "pairs"
    lines = [str(report)]
    kind = "largest gradients"
    if report.are_clipped:
        kind += " after clipping"
    for rank, values in report.gradients.items():
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
        lines.append(f"{rank}: {kind}: {shown or 'none'}")
    for pack in report.packs:
        keys = ", ".join(pack.samples)
        lines.append(
            f"pack {pack.pack}: loss {pack.loss:g} of {pack.loss_tokens} {unit}, samples {keys}"
        )
    worst = inspect_pack(recipe, "train", report.worst.pack, png=png, max_height=max_height)
    return "\n".join([*lines, "", worst])


def inspect_sample(recipe: Recipe, sample: str, *, png: Path | None) -> str:
    """Describe one sample, named SHARD.tar:KEY, as a pack of its own."""
    shard, separator, key = sample.rpartition(":")
    if not separator:
        raise ConfigError(f"--sample is {sample!r}: SHARD.tar:KEY is needed")
    tokenizer = open_tokenizer(recipe)
    stream = _stream_of_sample(recipe, Path(shard), key, tokenizer=tokenizer)
    view = view_pack(
        stream, 0, recipe=recipe, tokenizer=tokenizer, names=[shard], title=f"sample {key}"
    )
    return _show(view, png)


def _stream_of_sample(recipe: Recipe, shard: Path, key: str, *, tokenizer: Tokenizer) -> PackStream:
    encoder = sample_encoder(recipe, tokenizer)
    path, _ = find_index(shard, text_stamp(encoder.chat))
    index = read_index(path)
    keys = index.keys()
    if key not in keys:
        raise DataError(
            f"{shard}: no sample {key!r} among {len(keys)}, the first of which is {keys[:1]}"
        )
    row = keys.index(key)
    lengths = document_lengths(index, encoder=encoder)
    counts = (lengths.tokens[row], lengths.tiles[row], lengths.loss_tokens[row])
    # A plan of one pack, which holds this sample alone.
    entry = (0, 0, 0, row, 0, *counts)
    plan = PackPlan(
        {name: np.array([value]) for name, value in zip(COLUMNS, entry, strict=True)}, stamp={}
    )
    length = round_up(int(lengths.tokens[row]), recipe.data.document_alignment)
    return PackStream(
        plan,
        shards=[[shard]],
        indexes=[[path]],
        contents=[[index.header.fingerprint]],
        # As long as the sample needs, whatever the recipe's packs hold.
        data=dataclasses.replace(recipe.data, seq_length=length),
        encoders=[encoder],
        tile_share=(0, 1),
    )


def _show(view: PackView, png: Path | None, *, max_height: int = 0) -> str:
    text = "\n".join(describe(view))
    if png is None:
        return text
    png.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(view, max_height=max_height).save(png)
    return f"{text}\ncontact sheet: {png}"
