"""Packs of random tokens and tiles with the proportions of real ones."""

import dataclasses

import torch

from megatron_vita.config import Recipe
from megatron_vita.data.batch import Batch
from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.parallel import groups

IMAGE_SHARE = 0.6
SCORED_SHARE = 0.1


def make_pack(
    recipe: Recipe, *, documents: int, seed: int, length: int = 0, tiles: int = 0
) -> Batch:
    """Make a pack of `documents` of equal length with their tiles at the start.

    A tenth of the other tokens is scored. The pack has all tiles; those of a text-only model are none.

    Args:
        length: tokens of the pack; 0: the recipe's.
        tiles: number of tiles, a multiple of `documents`; 0: such that 60 % are image tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    length = length or recipe.data.seq_length
    rows = recipe.model.vision.image_token_length
    each = length // documents
    per_document = tiles // documents or int(each * IMAGE_SHARE / rows)
    if recipe.model.text_only:
        per_document = 0
    placements = torch.cat(
        [d * each + torch.arange(per_document) * (rows + 2) + 1 for d in range(documents)]
    )
    ids = torch.randint(0, recipe.model.language.vocab_size, (length,), generator=generator)
    scored = torch.rand(length, generator=generator) < SCORED_SHARE
    labels = torch.where(scored, ids.roll(-1), IGNORED_LABEL)
    for start in placements.tolist():
        labels[start - 1 : start + rows] = IGNORED_LABEL
    bounds = (torch.arange(documents + 1) * each).int()
    side = recipe.model.vision.image_size
    tiles = torch.randint(
        0, 256, (len(placements), 3, side, side), dtype=torch.uint8, generator=generator
    )
    return Batch(
        pack_id=seed,
        input_ids=ids,
        labels=labels,
        document_starts=bounds,
        cu_seqlens=bounds if recipe.data.isolate_documents else bounds[[0, -1]],
        document_sources=torch.zeros(documents, dtype=torch.int64),
        tiles=tiles,
        tile_ids=torch.arange(len(tiles)),
        frames=torch.ones(len(tiles), dtype=torch.bool),
        placements=placements,
        num_tokens=length,
        sample_keys=[],
    )


def dealt_to_this_rank(pack: Batch) -> Batch:
    """The pack with the tiles assigned to this rank."""
    layout = groups.rank_layout()
    assigned = assign_tiles(pack.frames, layout.tile_ranks)[layout.tile_rank]
    if not groups.is_first_stage():
        assigned = assigned[:0]
    return dataclasses.replace(pack, tiles=pack.tiles[assigned], tile_ids=assigned)
