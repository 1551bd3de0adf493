"""Our adapters and PEFT's: ours join those of several of Hugging Face's maps in two matrices.

`a` [pieces * r, in] and `b` [stack, rows, r] are those of `model/lora.py`, whole; PEFT has A [r, in] and
B [out, r] for each map.
"""

import torch
from torch import Tensor

from megatron_vita.config import AdaptedMap
from megatron_vita.model.lora import row_owners

Matrices = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r] of one of Hugging Face's maps."""


def split_adapter(adapted: AdaptedMap, a: Tensor, b: Tensor) -> dict[str, Matrices]:
    """Return A and B of each adapted piece, by the piece's name."""
    linear = adapted.linear
    owners = row_owners(linear).flatten()
    rows = b.flatten(0, 1)
    parts = zip(adapted.chosen, a.chunk(len(adapted.chosen)), strict=True)
    return {linear.pieces[i].name: (part, rows[owners == i]) for i, part in parts}


def join_adapter(adapted: AdaptedMap, matrices: dict[str, Matrices]) -> Matrices:
    """Return `a` and `b` from A and B of each adapted piece; the inverse of `split_adapter`."""
    linear = adapted.linear
    owners = row_owners(linear)
    chosen = [matrices[linear.pieces[i].name] for i in adapted.chosen]
    first = chosen[0][1]
    rows = first.new_zeros(owners.numel(), first.shape[1])
    for i, (_, part) in zip(adapted.chosen, chosen, strict=True):
        rows[owners.flatten() == i] = part
    return torch.cat([part for part, _ in chosen]), rows.view(*owners.shape, -1)


def split_norms(adapted: AdaptedMap, norms: Tensor) -> dict[str, Tensor]:
    """Return the values [out] of each adapted piece's rows, from those of our map [stack, rows]."""
    linear = adapted.linear
    owners = row_owners(linear).flatten()
    return {linear.pieces[i].name: norms.flatten()[owners == i] for i in adapted.chosen}


def join_norms(adapted: AdaptedMap, norms: dict[str, Tensor]) -> Tensor:
    """Return values of rows [stack, rows] from those of each adapted piece, 0 for other rows; the
    inverse of `split_norms`."""
    linear = adapted.linear
    owners = row_owners(linear)
    joined = torch.zeros(owners.shape)
    for i in adapted.chosen:
        joined[owners == i] = norms[linear.pieces[i].name]
    return joined


def merged_weight(
    adapted: AdaptedMap, weight: Tensor, update: Tensor, *, change: Tensor | None
) -> Tensor:
    """Add an update to a weight [out, in].

    Args:
        adapted: the map.
        weight: W in fp32.
        update: scale * B A of all rows.
        change: what DoRA adds to the norms of W's rows [stack, rows]; None: they follow the sum.
    """
    merged = weight + update
    if change is None:
        return merged
    norms = weight.norm(dim=1) + change.flatten()
    # A row may be 0; the bound is that of `squared_norms` in training.
    smallest = torch.finfo(torch.float32).tiny ** 0.5
    gain = (norms / merged.norm(dim=1).clamp_min(smallest))[:, None]
    owners = row_owners(adapted.linear).flatten()
    has_adapter = torch.isin(owners, torch.tensor(adapted.chosen))[:, None]
    return torch.where(has_adapter, gain * merged, merged)


def update_of(adapted: AdaptedMap, a: Tensor, b: Tensor) -> Tensor:
    """Compute B A for the rows of the whole map [out, in], zero in those without an adapter."""
    owners = row_owners(adapted.linear).flatten()
    rows = b.flatten(0, 1)
    update = a.new_zeros(len(owners), a.shape[1])
    parts = zip(adapted.chosen, a.chunk(len(adapted.chosen)), strict=True)
    for i, part in parts:
        mine = owners == i
        update[mine] = rows[mine] @ part
    return update
