"""Adapters of a served language model, several in one forward pass.

The matrices of all adapters of a linear map are laid side by side: A x has a few columns for each
adapter, and each row of the batch keeps those of its own. So a batch may mix adapters freely, and
CUDA graphs need know nothing of which row has which, only whether any row has one.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vita import platform
from megatron_vita.checkpoint import base, store
from megatron_vita.config import Recipe, adapted_maps, recipe_from_dict, replaced
from megatron_vita.config.groups.lora import Part
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.model.lora import Adapter, attach, named_linears
from megatron_vita.model.vita import VitaModel

logger = logging.getLogger(__name__)

NO_ADAPTER = 0
"""Adapter number of rows that use the base model alone; adapters are numbered from 1."""


class ServedAdapters:
    """The adapters of an engine by name, and the adapter of each row of a forward pass."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.is_used = False
        self._rows: Tensor = torch.empty(0, dtype=torch.int64)
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def begin(self, rows: Tensor, *, is_used: bool) -> None:
        """Begin a forward pass.

        Args:
            rows: [t], on the device: the number of each row's adapter.
            is_used: whether any row of any rank has an adapter; false: no map computes updates.
        """
        self.is_used = is_used
        self._rows = rows
        self._masks = {}

    def mask(self, owner: Tensor, *, key: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return 1 where a column is of the row's adapter, else 0: [t, columns].

        `key` is `owner` [columns] on the host. Maps whose columns have the same owners share a
        mask, since launching kernels is most of an update's time.
        """
        if key not in self._masks:
            self._masks[key] = (self._rows[:, None] == owner).to(dtype)
        return self._masks[key]

    def number_of(self, name: str) -> int:
        """Return the number of an adapter; that of the base for an empty name.

        Raises:
            ConfigError: there is none of this name.
        """
        if not name:
            return NO_ADAPTER
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise ConfigError(f"adapter {name!r:.200} is not here; known: {known}")
        return self.names.index(name) + 1


class StackedAdapter(nn.Module):
    """Adapters of one linear map side by side."""

    a: Tensor
    b: Tensor
    owner: Tensor

    def __init__(self, adapters: Mapping[int, Adapter], served: ServedAdapters) -> None:
        """`adapters`: those of the map by their numbers, at least one."""
        super().__init__()
        self._served = served
        self._reduce = next(iter(adapters.values())).reduce
        a = [adapter.a.detach() for adapter in adapters.values()]
        # The scale is part of B here, so that no step multiplies by it.
        b = [adapter.output_weight().detach() * adapter.scale for adapter in adapters.values()]
        owner = [torch.full((len(x.a),), number) for number, x in adapters.items()]
        for name, parts, axis in (("a", a, 0), ("b", b, 1), ("owner", owner, 0)):
            self.register_buffer(name, torch.cat(parts, dim=axis), persistent=False)
        self._key = tuple(self.owner.tolist())

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the updates of each row's adapter to the map's output, in place: [t, 1, in], [t, 1,
        out]."""
        if not self._served.is_used:
            return output
        hidden = self._reduce(F.linear(x, self.a)).flatten(0, -2)
        # Columns of other adapters become zero, so that one product serves rows of all.
        hidden = hidden * self._served.mask(self.owner, key=self._key, dtype=hidden.dtype)
        output.view(-1, output.shape[-1]).addmm_(hidden, self.b.t())
        return output


def load_adapters(model: VitaModel, recipe: Recipe, folders: Mapping[str, Path]) -> ServedAdapters:
    """Load adapters beside a model's weights. Collective.

    Args:
        model: the base, with its weights.
        recipe: of the base, at the layout that it is served with.
        folders: checkpoints of adapters by name, or folders of such.

    Raises:
        CheckpointError: adapters are missing, of another base, or of other parts than the language
            model.
    """
    served = ServedAdapters(list(folders))
    model_base = _Base(model, recipe)
    by_map: dict[str, dict[int, Adapter]] = {}
    for number, (name, folder) in enumerate(folders.items(), start=1):
        for adapter in _load(model_base, store.find_checkpoint(folder)):
            by_map.setdefault(adapter.name, {})[number] = adapter
        logger.info("adapter %s from %s", name, folder)
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    linears = dict(named_linears(model))
    for name, adapters in by_map.items():
        stacked = StackedAdapter(adapters, served).to(platform.device())
        for matrix in ("a", "b"):
            setattr(stacked, matrix, getattr(stacked, matrix).to(dtype))
        attach(linears[name], stacked)
    return served


class _Base:
    """The served model, which adapters are checked against."""

    def __init__(self, model: VitaModel, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe

    @functools.cached_property
    def stamp(self) -> str:
        """Stamp of its weights, computed once for all adapters. Collective."""
        return base.stamp_of(base.base_state(store.model_state([self.model])))

    def check(self, checkpoint: Path, known: Mapping[str, str], *, saved: Recipe) -> None:
        """Check the stamp of the base of adapters, where it can be compared. Collective.

        Args:
            checkpoint: holds the adapters.
            known: the field `base` of its manifest.
            saved: recipe of the run that trained them.

        Raises:
            CheckpointError: another base.
        """
        same_weights = (
            saved.model.text_only == self.recipe.model.text_only
            and saved.training.bf16 == self.recipe.training.bf16
        )
        if not known.get("stamp") or not same_weights:
            logger.warning(
                "%s: it cannot be checked that its adapters are of this base", checkpoint
            )
            return
        base.check_base(checkpoint, known, stamp=self.stamp, path="the checkpoint that is served")


def _load(model_base: _Base, checkpoint: Path) -> list[Adapter]:
    """Load the adapters of one checkpoint, in fp32 on the host."""
    manifest = store.read_manifest(checkpoint)
    known = base.base_of(checkpoint, manifest)
    saved = recipe_from_dict(manifest["recipe"])
    _check(checkpoint, saved, model_base.recipe)
    model_base.check(checkpoint, known, saved=saved)
    adapters = [
        Adapter(adapted, rank=saved.lora.rank, scale=saved.lora.scale, sequence_parallel=False)
        for adapted in adapted_maps(saved.model, saved.lora)
    ]
    metadata = store.sharding_metadata()
    state = {adapter.name: adapter.sharded_state(metadata=metadata) for adapter in adapters}
    loaded = store.load_state(checkpoint, {"model": state})["model"]
    for adapter in adapters:
        adapter.load_state_dict(loaded[adapter.name])
    return adapters


def _check(checkpoint: Path, saved: Recipe, recipe: Recipe) -> None:
    """Check that adapters are of this language model, and that nothing else was trained."""
    if saved.lora.dora:
        raise CheckpointError(
            f"{checkpoint}: its adapters are DoRA's (lora.dora), whose norms cannot be mixed in a batch: merge them "
            "(vita convert merge-lora), and serve the result"
        )
    alone = {"text_only": True}
    store.check_model(
        checkpoint, saved=replaced(saved.model, alone), model=replaced(recipe.model, alone)
    )
    parts: tuple[Part, ...] = ("vision_model", "projector")
    for part in () if saved.model.text_only else parts:
        if not saved.is_frozen(part):
            raise CheckpointError(
                f"{checkpoint}: its run trained the {part} too, and only adapters of the language model can be served "
                "beside others: merge it (vita convert merge-lora), and serve the result"
            )
    differing = [
        name for name in ("text", "media") if getattr(saved, name) != getattr(recipe, name)
    ]
    if saved.data.seq_length > recipe.data.seq_length:
        differing.append(f"data.seq_length ({saved.data.seq_length})")
    if differing:
        logger.warning(
            "%s: was trained with another %s; prompts, media and context are those of the base that is "
            "served (--max-context)",
            checkpoint,
            " and ".join(differing),
        )
