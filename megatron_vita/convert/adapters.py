"""Checkpoints of adapters as files: reading, writing, and merging into their base."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.base import BASE, base_of, check_base, stamp_of_parts
from megatron_vita.checkpoint.manifest import MANIFEST, SCORES, TENSORS
from megatron_vita.checkpoint.tokenizer_copy import FILE, FOLDER, copy_tokenizer
from megatron_vita.config import AdaptedMap, Recipe, adapted_maps, recipe_from_dict
from megatron_vita.convert.families.adapters import Matrices, merged_weight, update_of
from megatron_vita.convert.families.mapping import TensorLocation, location_of
from megatron_vita.convert.folders import new_folder
from megatron_vita.convert.formats.tensors import check_finite
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.formats.torch_dist_writer import TensorChunk, write_distributed
from megatron_vita.convert.progress import ProgressBar
from megatron_vita.convert.shapes import stored_shapes
from megatron_vita.convert.writing import write_first_manifest
from megatron_vita.errors import CheckpointError
from megatron_vita.model.lora import ADAPTER, is_adapter

ALL_PARTS = ("vision_model", "projector", "language_model")
_OF_TENSORS = (".metadata", "common.pt", "metadata.json", MANIFEST, SCORES, "model.yaml")
"""Files that describe a checkpoint's tensors and its training, beside those that hold them."""


@dataclass(frozen=True, kw_only=True)
class AdapterCheckpoint:
    """A checkpoint that holds adapters, and what was trained beside them, alone."""

    path: Path
    recipe: Recipe
    base: dict[str, str]  # path and stamp
    source: DistSource

    @classmethod
    def open(cls, path: Path) -> "AdapterCheckpoint":
        """Open a checkpoint of adapters, or the newest one in a folder.

        Raises:
            CheckpointError: it holds no adapters.
        """
        checkpoint = store.find_checkpoint(path)
        manifest = store.read_manifest(checkpoint)
        recipe = recipe_from_dict(manifest["recipe"])
        base = base_of(checkpoint, manifest)
        return cls(path=checkpoint, recipe=recipe, base=base, source=DistSource(checkpoint))

    @property
    def adapted(self) -> list[AdaptedMap]:
        """The maps that have adapters."""
        return adapted_maps(self.recipe.model, self.recipe.lora)

    def read(self, adapted: AdaptedMap) -> Matrices:
        """Return `a` and `b` of a map's adapters in fp32."""
        keys = [f"{adapted.linear.name}.{ADAPTER}.{name}" for name in ("a", "b")]
        a, b = (self._read(key) for key in keys)
        return a, b

    def read_norms(self, adapted: AdaptedMap) -> Tensor | None:
        """Return what DoRA adds to the norms of a map's rows in fp32; None without DoRA."""
        if not self.recipe.lora.dora:
            return None
        return self._read(f"{adapted.linear.name}.{ADAPTER}.d")

    def _read(self, key: str) -> Tensor:
        if key not in self.source.infos:
            raise CheckpointError(f"{self.path}: has no tensor {key}")
        tensor = self.source.read(TensorLocation(key))
        check_finite(tensor, name=key, file=self.path)
        return tensor.float()

    def trained_beside(self) -> set[str]:
        """Return the keys of weights that were trained fully beside the adapters."""
        beginnings = tuple(f"{part}." for part in ALL_PARTS)
        return {
            key for key in self.source.infos if key.startswith(beginnings) and not is_adapter(key)
        }


def write_adapters(
    destination: Path,
    recipe: Recipe,
    *,
    base: dict[str, str],
    matrices: Callable[[AdaptedMap], Matrices],
    norms: Callable[[AdaptedMap], Tensor] | None = None,
) -> None:
    """Write a checkpoint of adapters alone, completely or not at all.

    Args:
        destination: folder to write.
        recipe: model and adapters.
        base: path and stamp of the weights that they belong to; an empty stamp is not checked.
        matrices: returns `a` and `b` of a map's adapters.
        norms: returns what DoRA adds to the norms of a map's rows.
    """
    chunks = []
    for adapted in adapted_maps(recipe.model, recipe.lora):
        tensors = dict(zip(("a", "b"), matrices(adapted), strict=True))
        if norms is not None:
            tensors["d"] = norms(adapted)
        for name, tensor in tensors.items():
            key = f"{adapted.linear.name}.{ADAPTER}.{name}"
            chunks.append(_small_chunk(key, tensor.contiguous()))
    with new_folder(destination) as folder:
        write_distributed(folder, chunks)
        write_first_manifest(folder, recipe, {BASE: base})


def _small_chunk(key: str, tensor: Tensor) -> TensorChunk:
    return TensorChunk(
        location=TensorLocation(key),
        rows=None,
        whole=tuple(tensor.shape),
        dtype=tensor.dtype,
        make=lambda: tensor,
        done=lambda: None,
    )


def merge_adapters(adapters: Path, destination: Path, *, base: Path | None = None) -> None:
    """Write a checkpoint of the whole model, with the adapters added to its weights.

    Args:
        adapters: checkpoint of adapters, or a folder of such.
        destination: folder to write.
        base: checkpoint of the weights beside them; None for the one they were trained on.

    Raises:
        CheckpointError: the base is missing or another one.
    """
    opened = AdapterCheckpoint.open(adapters)
    whole = open_base(opened, base)
    merge = _Merge(adapters=opened, base=whole.source)
    with new_folder(destination) as folder:
        _copy_other_files(whole.path, folder)
        _take_tokenizer(opened.path, folder)
        with ProgressBar("merging", nbytes=merge.nbytes) as progress:
            write_distributed(folder, list(merge.chunks(progress)))
        write_first_manifest(folder, _recipe_of_merged(whole.recipe, opened.recipe))


@dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """A checkpoint of the whole model that adapters belong to."""

    path: Path
    recipe: Recipe
    source: DistSource


def open_base(adapters: AdapterCheckpoint, base: Path | None) -> BaseCheckpoint:
    """Open the checkpoint of the weights that adapters belong to.

    Args:
        adapters: the adapters.
        base: names it; None for the one they were trained on.

    Raises:
        CheckpointError: it is missing, or another one.
    """
    if base is None and not adapters.base["path"]:
        raise CheckpointError(
            f"{adapters.path}: was trained on initial weights, which no checkpoint holds: name one "
            "with --base"
        )
    path = store.find_checkpoint(base or adapters.base["path"])
    recipe = store.recipe_of(path)
    store.check_model(path, saved=recipe.model, model=adapters.recipe.model)
    opened = BaseCheckpoint(path=path, recipe=recipe, source=DistSource(path))
    _check_stamp(adapters, opened)
    return opened


def _check_stamp(adapters: AdapterCheckpoint, base: BaseCheckpoint) -> None:
    """Check that a base is the one that the adapters were trained on.

    Raises:
        CheckpointError: it is another.
    """
    # Adapters of other programs have no stamp.
    if not adapters.base["stamp"]:
        return
    dtype = torch.bfloat16 if adapters.recipe.training.bf16 else torch.float32
    stamp = stamp_of_parts(
        (place.key, place.layer, base.source.read(place).to(dtype))
        for place in _locations(adapters.recipe)
    )
    check_base(adapters.path, adapters.base, stamp=stamp, path=str(base.path))


def _locations(recipe: Recipe) -> Iterator[TensorLocation]:
    """Yield the places of all tensors of a model, layer by layer where they are stacked."""
    for key in stored_shapes(recipe.model, parts=_parts(recipe)):
        if ".decoder.layers." in key:
            for layer in range(recipe.model.language.num_layers):
                yield TensorLocation(key, layer)
        else:
            yield TensorLocation(key)


def base_weight(base: DistSource, adapted: AdaptedMap) -> Tensor:
    """Return the weight [out, in] of an adapted map in fp32."""
    weight = base.read(location_of(f"{adapted.linear.name}.weight"))
    return weight.view(-1, weight.shape[-1]).float()


def _take_tokenizer(adapters: Path, folder: Path) -> None:
    """Put the tokenizer that adapters were trained with in the place of the base's, if they have
    one."""
    own = [adapters / name for name in (FOLDER, FILE) if (adapters / name).exists()]
    if not own:
        return
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    (folder / FILE).unlink(missing_ok=True)
    copy_tokenizer(own[0], folder)


def _recipe_of_merged(base: Recipe, adapters: Recipe) -> Recipe:
    """Return the base's recipe with what the adapters were trained on: prompts, media, length."""
    fields = {name: getattr(adapters, name) for name in ("text", "media", "generation")}
    return base.replaced({**fields, "data.seq_length": adapters.data.seq_length})


def _copy_other_files(checkpoint: Path, folder: Path) -> None:
    """Copy the tokenizer of a base and the files of its origin, but for what describes its training."""
    for path in checkpoint.iterdir():
        if path.name in _OF_TENSORS or path.suffix == TENSORS:
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


class _Merge:
    """Weights of a base with adapters added, one tensor or layer at a time."""

    def __init__(self, *, adapters: AdapterCheckpoint, base: DistSource) -> None:
        self.adapters = adapters
        self.base = base
        self.places = list(_locations(adapters.recipe))
        self.beside = adapters.trained_beside()
        self.adapted = {
            location_of(f"{adapted.linear.name}.weight"): adapted for adapted in adapters.adapted
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.base.infos[key].nbytes for key in {place.key for place in self.places})

    def chunks(self, progress: ProgressBar) -> Iterator[TensorChunk]:
        """Yield what is to be written."""
        for place in self.places:
            yield self._chunk(place, progress)

    def _chunk(self, place: TensorLocation, progress: ProgressBar) -> TensorChunk:
        info = self.base.infos[place.key]

        def done() -> None:
            self.base.release(place)
            progress.advance(info.nbytes // (info.shape[0] if place.layer is not None else 1))

        return TensorChunk(
            location=place,
            rows=None,
            whole=info.shape,
            dtype=info.dtype,
            make=lambda: self._merged(place).to(info.dtype).contiguous(),
            done=done,
        )

    def _merged(self, place: TensorLocation) -> Tensor:
        if place.key in self.beside:
            return self.adapters.source.read(place)
        weight = self.base.read(place)
        adapted = self.adapted.get(place)
        if adapted is None:
            return weight
        update = self.adapters.recipe.lora.scale * update_of(adapted, *self.adapters.read(adapted))
        merged = merged_weight(
            adapted,
            weight.view(update.shape).float(),
            update,
            change=self.adapters.read_norms(adapted),
        )
        return merged.view(weight.shape)


def _parts(recipe: Recipe) -> tuple[str, ...]:
    if recipe.model.text_only:
        return ("language_model",)
    return ALL_PARTS
