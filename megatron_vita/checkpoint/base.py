"""The base of adapters: their checkpoints hold what is trained alone, and a stamp of the rest.

The stamp is computed from the weights themselves, so that a base may be moved, converted again or
saved at another layout. It is a sum of integers over all elements, each in the bits of its type and
weighted by the tensor's name and the element's row, so that it does not depend on how tensors are
divided over ranks.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import Recipe, adapted_maps
from megatron_vita.config.groups.lora import Part
from megatron_vita.errors import CheckpointError
from megatron_vita.model.lora import is_adapter
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel.sharded_state import sharded_tensors

BASE = "base"
"""Field of the manifest: `path` and `stamp` of the weights that the adapters belong to."""
_INTEGERS = {2: torch.int16, 4: torch.int32}
_ROWS_AT_ONCE = 1 << 12


def trained_state(state: dict[str, Any], chunks: list[VitaModel]) -> dict[str, Any]:
    """Return the part of the chunks' sharded state that is trained."""
    trained = {}
    for number, chunk in enumerate(chunks):
        names = {name for name, p in chunk.named_parameters() if p.requires_grad}
        of_chunk = state[str(number)]
        trained[str(number)] = {name: value for name, value in of_chunk.items() if name in names}
    return trained


def adapters_state(state: dict[str, Any], saved: Recipe) -> dict[str, Any]:
    """Return the part of the chunks' sharded state that a run of recipe `saved` trained."""
    parts = [part for part in get_args(Part) if not getattr(saved.training, f"freeze_{part}")]
    beginnings = tuple(f"{part}." for part in parts)
    return {
        number: {
            name: value
            for name, value in of_chunk.items()
            if is_adapter(name) or name.startswith(beginnings)
        }
        for number, of_chunk in state.items()
    }


def base_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the chunks' sharded state without their adapters."""
    return {
        number: {name: value for name, value in of_chunk.items() if not is_adapter(name)}
        for number, of_chunk in state.items()
    }


def named_state(state: dict[str, Any], names: Mapping[str, set[str]]) -> dict[str, Any]:
    """Return the part of the chunks' sharded state that `names` lists by chunk."""
    return {
        number: {name: value for name, value in of_chunk.items() if name in names.get(number, ())}
        for number, of_chunk in state.items()
    }


class BaseStamp:
    """The stamp of weights that may not be in memory all at once."""

    def __init__(self) -> None:
        self._total = torch.zeros((), dtype=torch.int64, device=platform.device())

    @torch.no_grad()
    def add(self, state: dict[str, Any]) -> None:
        """Add the weights in a sharded state, each once."""
        for tensor in sharded_tensors(state):
            # Each element counts once, however many ranks hold it.
            if is_main_replica(tensor.replica_id):
                axis = tensor.prepend_axis_num
                layer = tensor.global_offset[0] if axis else None
                first_row = tensor.global_offset[axis]
                weight = tensor.data.detach()
                self._total += _sum_of(weight, tensor.key, layer, first_row=first_row)

    def text(self) -> str:
        """Return the stamp, the same at every layout. Collective."""
        total = self._total.clone()
        dist.all_reduce(total)
        return _as_text(total)


def stamp_of(state: dict[str, Any]) -> str:
    """Compute the stamp of the weights in a sharded state; the same at every layout. Collective."""
    stamp = BaseStamp()
    stamp.add(state)
    return stamp.text()


def stamp_of_parts(parts: Iterable[tuple[str, int | None, Tensor]]) -> str:
    """Compute the stamp of whole tensors, given with their keys and numbers of layers.

    Args:
        parts: tensors in the type that they are trained in; None for tensors outside of layers.
    """
    total = torch.zeros((), dtype=torch.int64)
    for key, layer, tensor in parts:
        total += _sum_of(tensor, key, layer)
    return _as_text(total)


def _as_text(total: Tensor) -> str:
    return f"{int(total) % 2**64:016x}"


def _sum_of(tensor: Tensor, key: str, layer: int | None, *, first_row: int = 0) -> Tensor:
    """Sum a tensor's bits by name and row, modulo 2**64."""
    rows = tensor.reshape(len(tensor), -1)
    digest = hashlib.sha256(f"{key}/{layer}".encode()).digest()
    # Odd, and so invertible modulo 2**64: the factor loses no bit of the sum.
    of_name = int.from_bytes(digest[:8], "little", signed=True) | 1
    total = rows.new_zeros((), dtype=torch.int64)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE].contiguous()
        sums = part.view(_INTEGERS[part.element_size()]).sum(1, dtype=torch.int64)
        # Weights from 1: swapped rows give another sum, and the first row counts.
        numbers = torch.arange(len(part), device=part.device) + (first_row + start + 1)
        total += (sums * numbers).sum()
    return total * of_name


def check_base(checkpoint: Path, known: Mapping[str, str], *, stamp: str, path: str) -> None:
    """Check that adapters belong to the base that was loaded.

    Args:
        checkpoint: holds the adapters.
        known: the field `base` of its manifest.
        stamp: of the base that was loaded.
        path: of that base; empty for initial weights.

    Raises:
        CheckpointError: another base.
    """
    if known.get("stamp") != stamp:
        raise CheckpointError(
            f"{checkpoint}: its adapters belong to another base: {named(known.get('path', ''))}, stamp "
            f"{known.get('stamp')}; the base given here is {named(path)}, stamp {stamp}"
        )


def check_adapters(checkpoint: Path, *, saved: Recipe, recipe: Recipe) -> None:
    """Check that a checkpoint's adapters are those of a recipe: maps, rank, scale, kind, and that what
    was trained beside them is trained on.

    Raises:
        CheckpointError: names the field that differs.
    """
    for name in ("rank", "alpha", "rslora", "dora"):
        then = getattr(saved.lora, name)
        now = getattr(recipe.lora, name)
        if then != now:
            raise CheckpointError(
                f"{checkpoint}: lora.{name} is {then} there and {now} in the recipe"
            )
    if adapted_maps(saved.model, saved.lora) != adapted_maps(recipe.model, recipe.lora):
        raise CheckpointError(
            f"{checkpoint}: lora.targets are {saved.lora.targets} there, which are other maps than "
            f"{recipe.lora.targets} in the recipe"
        )
    for part in get_args(Part):
        field = f"freeze_{part}"
        was_trained = not getattr(saved.training, field) and _has_part(saved, part)
        if was_trained and getattr(recipe.training, field):
            raise CheckpointError(
                f"{checkpoint}: its run trained the {part} too, but training.{field} is true in the "
                "recipe, whose checkpoints would leave it out: set it to false, or merge first "
                "(vita convert merge-lora)"
            )


def _has_part(recipe: Recipe, part: Part) -> bool:
    return part == "language_model" or not recipe.model.text_only


def named(path: str) -> str:
    """Return a base's path, or words for weights that no checkpoint gave."""
    return path or "the initial weights of training.seed"


def check_whole(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds a whole model.

    Raises:
        CheckpointError: it holds adapters alone.
    """
    if BASE in manifest:
        raise CheckpointError(
            f"{checkpoint}: holds adapters alone, of {named(manifest[BASE]['path'])}; merge them first: "
            "vita convert merge-lora"
        )


def base_of(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the field `base` of a checkpoint of adapters.

    Raises:
        CheckpointError: it holds a whole model.
    """
    if BASE not in manifest:
        raise CheckpointError(f"{checkpoint}: holds a whole model, no adapters")
    known: dict[str, str] = manifest[BASE]
    return known
