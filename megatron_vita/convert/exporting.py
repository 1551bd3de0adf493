"""From a distributed checkpoint to a Hugging Face folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.checkpoint import store
from megatron_vita.config import ModelConfig, Recipe, recipe_from_dict
from megatron_vita.convert import companions
from megatron_vita.convert.config_file import CONFIG, Config
from megatron_vita.convert.dist_in import DistSource
from megatron_vita.convert.folders import new_folder
from megatron_vita.convert.layouts import (
    ALL_PARTS,
    CAUSAL,
    EVA,
    INTERNVL_HF,
    LONG_VITA,
    Layout,
    layout_named,
    layout_of,
)
from megatron_vita.convert.progress import Progress
from megatron_vita.convert.safetensors_in import SafetensorsSource
from megatron_vita.convert.safetensors_out import SafetensorsWriter
from megatron_vita.convert.shapes import stored_shapes
from megatron_vita.convert.tensors import TensorInfo, check_finite
from megatron_vita.convert.transfers import Rows, Transfer, plan_export
from megatron_vita.errors import CheckpointError

LARGEST_FILE = 5 << 30  # bytes


@dataclass(frozen=True, kw_only=True)
class Export:
    """All that is to be done, checked."""

    recipe: Recipe
    layout: Layout
    like: Path | None  # a folder whose config and companions are taken over
    source: DistSource
    transfers: list[Transfer]


def plan(checkpoint: Path, *, layout: str, like: Path | None) -> Export:
    """Finds the layout: the named one, that of `like`, that which the checkpoint came from, or that of its parts."""
    checkpoint = store.find_checkpoint(checkpoint)
    recipe = recipe_from_dict(store.read_manifest(checkpoint)["recipe"])
    chosen, like = _choose(checkpoint, recipe.model, layout=layout, like=like)
    source = DistSource(checkpoint)
    shapes = stored_shapes(recipe.model, parts=chosen.parts)
    transfers = plan_export(chosen.table(recipe.model), infos=source.infos, shapes=shapes, source=checkpoint)
    return Export(recipe=recipe, layout=chosen, like=like, source=source, transfers=transfers)


def _choose(checkpoint: Path, model: ModelConfig, *, layout: str, like: Path | None) -> tuple[Layout, Path | None]:
    if like is not None:
        found = layout_of(Config.read(like))
        if layout and layout != found.name:
            raise CheckpointError(f"{like}: is of layout {found.name}, not {layout}")
        return _fitting(found, model), like
    kept = sorted(folder for folder in (checkpoint / companions.FOLDER).glob("*") if (folder / CONFIG).exists())
    if layout:
        chosen = layout_named(layout)
    elif len(kept) == 1:
        chosen = layout_named(kept[0].name)
    else:
        whole = LONG_VITA if model.projector.kind == LONG_VITA.projector else INTERNVL_HF
        chosen = CAUSAL if model.text_only else whole
    folder = checkpoint / companions.FOLDER / chosen.name
    return _fitting(chosen, model), folder if folder in kept else None


def _fitting(layout: Layout, model: ModelConfig) -> Layout:
    if model.text_only and layout.parts != ("language_model",):
        raise CheckpointError(
            f"layout {layout.name} has a vision tower, but model.text_only is true: use {CAUSAL.name}"
        )
    if layout.parts == ALL_PARTS and model.projector.kind != layout.projector:
        raise CheckpointError(
            f"layout {layout.name} has a projector of kind {layout.projector}; "
            f"model.projector.kind is {model.projector.kind}"
        )
    return layout


def export_checkpoint(checkpoint: Path, destination: Path, *, layout: str = "", like: Path | None = None) -> Export:
    """Writes the Hugging Face folder `destination`. CheckpointError, with nothing written, for what is wrong."""
    work = plan(checkpoint, layout=layout, like=like)
    with new_folder(destination) as folder:
        if work.like is not None:
            companions.copy_companions(work.like, folder)
        elif work.recipe.text.tokenizer and "language_model" in work.layout.parts:
            _copy_tokenizer(work.source.folder / work.recipe.text.tokenizer, folder)
        _write_config(work, folder)
        _write_tensors(work, folder)
    return work


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    if tokenizer.is_dir():
        companions.copy_companions(tokenizer, folder)
        (folder / CONFIG).unlink(missing_ok=True)  # of another model


def _write_config(work: Export, folder: Path) -> None:
    """The config that was taken over, to the letter if it says what the model is; else one that does."""
    base = Config.read(work.like) if work.like is not None else Config({}, "")
    names = {name for transfer in work.transfers for name in transfer.rule.theirs}
    part_of_more = "vision_config" in base.values and work.layout.parts == ("vision_model",) and work.layout != EVA
    if base.values and not part_of_more and _same(work.layout, work.layout.read(base, names), work.recipe.model):
        return
    fields = work.layout.write(work.recipe.model, base.values)
    fields["dtype"] = str(work.transfers[0].dtype).removeprefix("torch.")
    fields.pop("torch_dtype", None)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _same(layout: Layout, one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two models are of the same shapes in the parts of a layout; first weights do not count."""

    def shapes(model: ModelConfig) -> list[dict[str, Any]]:
        groups = [asdict(getattr(model, part.removesuffix("_model"))) for part in layout.parts]
        return [{n: v for n, v in group.items() if not n.endswith(("init", "init_method_std"))} for group in groups]

    return shapes(one) == shapes(other)


def _spare(work: Export) -> SafetensorsSource | None:
    """Tensors that came along with the origin."""
    folder = work.like / companions.SPARE if work.like is not None else None
    return SafetensorsSource(folder) if folder is not None and folder.exists() else None


def _write_tensors(work: Export, folder: Path) -> None:
    groups: list[Mapping[str, TensorInfo]] = [transfer.their_infos(folder) for transfer in work.transfers]
    spare = _spare(work)
    if spare is not None:
        groups.append(spare.infos)
    writer = SafetensorsWriter(folder, groups, largest=LARGEST_FILE)
    with Progress("writing", nbytes=sum(transfer.nbytes for transfer in work.transfers)) as progress:
        for transfer in work.transfers:
            for names, rows in transfer.portions():
                ours = read_ours(work.source, transfer, rows)
                check_finite(ours, name=transfer.place.key, file=work.source.folder)
                for name, tensor in (transfer.split(ours) if rows is None else {names[0]: ours}).items():
                    writer.write(name, tensor)
                    progress.advance(tensor.nbytes)
            work.source.release(transfer.place)
        if spare is not None:
            for name in spare.infos:
                writer.write(name, spare.read(name))
        writer.close()


def read_ours(source: DistSource, transfer: Transfer, rows: Rows = None) -> Tensor:
    """A tensor of ours or some of its rows, without those that pad the vocabulary."""
    if rows is not None:
        return source.read(transfer.place, rows)
    tensor = source.read(transfer.place)
    return tensor if tensor.shape == torch.Size(transfer.shape) else tensor[: transfer.shape[0]]
