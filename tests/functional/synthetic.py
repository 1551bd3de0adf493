"""A tiny model and packs of random documents, the same on every rank."""

import itertools
from dataclasses import replace
from typing import Any

import torch

from megatron_vita.config import (
    DataConfig,
    DatasetConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectorConfig,
    Recipe,
    TrainingConfig,
)
from megatron_vita.config import VisionConfig as Vision
from megatron_vita.data.batch import Batch, mask_documents
from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.slicing import RankLayout

LENGTH = 128
VOCAB = 96
ROWS = 4
IGNORED = -100
WIDE = {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 128}
"""Sizes whose rows are whole blocks of 4-bit weights, over two TP ranks too with blocks of 32."""
QUANTIZED = {
    **WIDE,
    "freeze_language_model": True,
    "freeze_vision_model": True,
    "freeze_projector": True,
    "rank": 3,
    "quantize_base": "nf4",
    "quantize_block_size": 32,
}


def tiny_recipe(**layout: Any) -> Recipe:
    """A recipe of the tiny model; keyword arguments are fields of its groups, `vision` holds fields
    of the tower."""
    recipe = Recipe(
        model=ModelConfig(
            vision=Vision(image_size=16, patch_size=4, num_layers=2, hidden_size=32, ffn_hidden_size=64,
                          num_attention_heads=4, layer_scale_init=1.0, init_method_std=0.2),
            # Features as large as word embeddings: the first norm would blow up the rounding of
            # smaller ones.
            projector=ProjectorConfig(init_method_std=0.2),
            language=LanguageConfig(num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
                                    num_query_groups=2, kv_channels=8, vocab_size=VOCAB, init_method_std=0.2),
        ),
        data=DataConfig(seq_length=LENGTH, train=[DatasetConfig(name="random", shards="none")]),
        # Orders of summation differ by 2e-8 in single elements of gradients, of which some have a
        # true value near zero.
        # Adam's step there changes by lr / epsilon times as much, which has to stay below the 1e-5
        # of weights.
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-3, lr_warmup_fraction=0.0, adam_eps=1e-5),
        training=TrainingConfig(global_batch_size=4, train_iters=10),
    )  # fmt: skip
    changes = {f"model.vision.{name}": v for name, v in layout.pop("vision", {}).items()}
    groups = {
        "parallel": recipe.parallel,
        "training": recipe.training,
        "data": recipe.data,
        "model": recipe.model,
        "model.language": recipe.model.language,
        "optimizer": recipe.optimizer,
        "lora": recipe.lora,
        "numerics": recipe.numerics,
        "dpo": recipe.dpo,
    }
    for name, value in layout.items():
        owner = next(path for path, group in groups.items() if hasattr(group, name))
        changes[f"{owner}.{name}"] = value
    return recipe.replaced(changes)


def random_document(
    tokens: int, *, tiles: int, generator: torch.Generator, alignment: int = 16
) -> tuple[torch.Tensor, ...]:
    """Ids, shifted labels and placements of one document, padded to a multiple of `alignment`."""
    padded = -(-tokens // alignment) * alignment
    ids = torch.zeros(padded, dtype=torch.int64)
    ids[:tokens] = torch.randint(1, VOCAB, (tokens,), generator=generator)
    scored = torch.rand(tokens, generator=generator) < 0.4
    placements = torch.arange(tiles) * (ROWS + 1) + 1
    for start in placements.tolist():
        scored[start : start + ROWS] = False
    labels = torch.full((padded,), IGNORED)
    target = torch.where(scored, ids[:tokens], IGNORED)
    labels[: tokens - 1] = target[1:]
    return ids, labels, placements


def make_pack(
    lengths: list[tuple[int, int]], *, seed: int, length: int = LENGTH, joined: bool = False
) -> Batch:
    """A pack of documents given as (tokens, tiles), with all its tiles; the tail is one last
    document.

    `joined`: without padding between documents, which see those before them.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = [
        random_document(tokens, tiles=tiles, generator=generator, alignment=1 if joined else 16)
        for tokens, tiles in lengths
    ]
    starts = [0]
    for ids, _, _ in documents:
        starts.append(starts[-1] + len(ids))
    tail = length - starts[-1]
    sources = torch.zeros(len(documents), dtype=torch.int64)
    if tail:
        documents.append(
            (
                torch.zeros(tail, dtype=torch.int64),
                torch.full((tail,), IGNORED),
                torch.tensor([]).long(),
            )
        )
        starts.append(length)
        sources = torch.cat([sources, torch.tensor([-1])])
    bounds = torch.tensor(starts, dtype=torch.int32)
    placements = torch.cat(
        [p + start for (_, _, p), start in zip(documents, starts, strict=False)]
    ).long()
    tiles = torch.randint(
        0, 256, (len(placements), 3, 16, 16), generator=generator, dtype=torch.uint8
    )
    segments = torch.tensor([0, length], dtype=torch.int32) if joined else bounds
    return Batch(
        pack_id=seed, input_ids=torch.cat([d[0] for d in documents]), labels=torch.cat([d[1] for d in documents]),
        loss_weights=_document_weights(starts, length) if seed % 2 else None,
        document_starts=bounds, cu_seqlens=segments, document_sources=sources, tiles=tiles,
        tile_ids=torch.arange(len(tiles)), placements=placements, frames=torch.arange(len(tiles)) % 7 > 3,
        num_tokens=sum(t for t, _ in lengths), sample_keys=[],
    )  # fmt: skip


def _document_weights(starts: list[int], length: int) -> torch.Tensor:
    """Documents weigh 1/2, 1 and 3/2 by turns: [length]."""
    weights = torch.ones(length)
    for i, (start, stop) in enumerate(itertools.pairwise(starts)):
        weights[start:stop] = (0.5, 1.0, 1.5)[i % 3]
    return weights


def make_step(step: int, recipe: Recipe) -> list[Batch]:
    """The four packs of a step, with numbers of tiles that grow and shrink from pack to pack and
    step to step: odd lengths and a tail, text only, media at the start alone, and a single loss row
    or none.
    """
    seed = 10 * step
    if recipe.dpo.beta:
        return make_pairs(step)
    joined = not recipe.data.isolate_documents
    shapes = [
        [(31, 2), (1, 0), (45, 5 - step), (16, 0)],
        [(47, 0), (80, 0)],
        [(111, 7 + step)],
        [(64, 1), (64, 0)],
    ]
    if recipe.model.text_only:
        shapes = [[(tokens, 0) for tokens, _ in shape] for shape in shapes]
    packs = [make_pack(shape, seed=seed + i + 1, joined=joined) for i, shape in enumerate(shapes)]
    packs[3].labels[:] = IGNORED
    if step == 0:
        packs[3].labels[70] = 5  # a single row on a single rank
    return packs


def make_pairs(step: int) -> list[Batch]:
    """Four packs of pairs, some with media, one with a tail and one with a pair that is masked."""
    shapes = [
        [(31, 2), (20, 2), (45, 0), (1, 0)],
        [(60, 0), (61, 0)],
        [(30, 3 + step), (48, 3 + step)],
        [(32, 1), (16, 1), (40, 0), (30, 0)],
    ]
    packs = [
        pair_up(make_pack(shape, seed=10 * step + i + 1, length=LENGTH))
        for i, shape in enumerate(shapes)
    ]
    return [*packs[:3], mask_documents(packs[3], [1], pad_id=0, rows_per_tile=ROWS)]


def pair_up(pack: Batch) -> Batch:
    """Take every two documents of a pack for the conversations of one pair."""
    count = int((pack.document_sources >= 0).sum())
    starts = torch.cat([pack.document_starts[:count:2], pack.document_starts[count:]])
    weights = None
    if pack.loss_weights is not None:
        weights = _document_weights(starts.tolist(), len(pack.input_ids))
    return replace(
        pack,
        document_starts=starts,
        document_sources=torch.cat(
            [pack.document_sources[:count:2], pack.document_sources[count:]]
        ),
        rejected_starts=pack.document_starts[1:count:2].long(),
        loss_weights=weights,
    )


def share_of(batch: Batch, layout: RankLayout, *, first_stage: bool) -> Batch:
    """The batch as the rank at `layout` would read it, with its own tiles only."""
    if first_stage:
        assigned = assign_tiles(batch.frames, layout.tile_ranks)[layout.tile_rank]
    else:
        assigned = batch.tile_ids[:0]
    return replace(batch, tiles=batch.tiles[assigned], tile_ids=assigned)
