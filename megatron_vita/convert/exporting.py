"""Export of a distributed checkpoint to a Hugging Face folder."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vita.checkpoint import store, tokenizer_copy
from megatron_vita.config import Recipe
from megatron_vita.convert.export_format import choose_format, config_fields, kept_folders
from megatron_vita.convert.families.config_file import CONFIG, Config
from megatron_vita.convert.families.folder_formats import FolderFormat, format_named
from megatron_vita.convert.families.mapping import location_of
from megatron_vita.convert.folders import new_folder
from megatron_vita.convert.formats.safetensors_reader import SafetensorsSource
from megatron_vita.convert.formats.safetensors_writer import SafetensorsWriter
from megatron_vita.convert.formats.tensors import TensorInfo, check_finite
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.progress import ProgressBar
from megatron_vita.convert.settings import sidecar_files
from megatron_vita.convert.settings.export_prompts import complete_folder
from megatron_vita.convert.shapes import stored_shapes
from megatron_vita.convert.transfers import Rows, Transfer, export_transfers
from megatron_vita.errors import CheckpointError

LARGEST_FILE = 5 << 30  # bytes
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """A checked export: everything is known but the values of tensors."""

    recipe: Recipe
    folder_format: FolderFormat
    like: Path | None  # a folder whose config and sidecar files are taken over
    tokenizer: Path | None  # folder of the tokenizer that the checkpoint was trained with
    kept: list[Path]  # folders of sidecar files of its parts
    config: dict[str, Any]
    source: DistSource
    transfers: list[Transfer]


def plan_export(checkpoint: Path, *, folder_format: str, like: Path | None) -> ExportPlan:
    """Plan an export without reading tensors; `choose_format` describes the choice of the format.

    Raises:
        CheckpointError: the checkpoint or the format does not fit the model.
    """
    checkpoint = store.find_checkpoint(checkpoint)
    recipe = store.recipe_of(checkpoint)
    kept = kept_folders(checkpoint, tokenizer=recipe.text.tokenizer)
    copied = checkpoint / tokenizer_copy.FOLDER
    trained_with = copied if like is None and copied.is_dir() else None
    chosen, like = choose_format(kept, recipe.model, folder_format=folder_format, like=like)
    source = DistSource(checkpoint)
    shapes = stored_shapes(recipe.model, parts=chosen.parts)
    rules = chosen.table(recipe.model)
    if foreign := {location_of(rule.ours).key for rule in rules} - shapes.keys():
        raise CheckpointError(
            f"format {chosen.name} is of other models: this one has no tensor {min(foreign)}; export its "
            "parts alone, by --format"
        )
    transfers = export_transfers(rules, infos=source.infos, shapes=shapes, source=checkpoint)
    # A mapping that omits a tensor would silently export an incomplete model.
    if lost := shapes.keys() - {transfer.location.key for transfer in transfers}:
        raise CheckpointError(
            f"format {chosen.name} is of other models: it has no place for tensor {min(lost)}"
        )
    base = Config.read(like).values if like is not None else {}
    config = config_fields(chosen, recipe.model, base=base, transfers=transfers)
    return ExportPlan(
        recipe=recipe,
        folder_format=chosen,
        like=like,
        tokenizer=trained_with,
        kept=kept,
        config=config,
        source=source,
        transfers=transfers,
    )


def export_checkpoint(
    checkpoint: Path, destination: Path, *, folder_format: str = "", like: Path | None = None
) -> ExportPlan:
    """Write the Hugging Face folder `destination`, completely or not at all.

    Raises:
        CheckpointError: the checkpoint cannot be exported to this format.
    """
    plan = plan_export(checkpoint, folder_format=folder_format, like=like)
    with new_folder(destination) as folder:
        _write_sidecar_files(plan, folder)
        _replace_tokenizer(plan, folder)
        config = plan.config | complete_folder(
            folder, folder_format=plan.folder_format, recipe=plan.recipe, config=plan.config
        )
        if plan.like is None or config != Config.read(plan.like).values:
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _write_tensors(plan, folder)
    return replace(plan, config=config)


def _write_sidecar_files(plan: ExportPlan, folder: Path) -> None:
    """Copy the sidecar files of the reused folder, or else those known for the parts. The language
    model's are copied last: its tokenizer must win."""
    if plan.like is not None:
        sidecar_files.copy_sidecar_files(plan.like, folder)
        return
    parts = {kept: set(format_named(kept.name).parts) for kept in plan.kept}
    known = [kept for kept in parts if parts[kept] & set(plan.folder_format.parts)]
    # Files of the same name overwrite each other in this order.
    known.sort(key=lambda kept: "language_model" in parts[kept])
    tokenizer = plan.source.folder / plan.recipe.text.tokenizer
    if (
        not known
        and tokenizer.is_dir()
        and "language_model" in plan.folder_format.parts
        and plan.recipe.text.tokenizer
    ):
        known = [tokenizer]
    for kept in known:
        sidecar_files.copy_sidecar_files(kept, folder)
    # It belongs to a part or to another model; the right one is written by `export_checkpoint`.
    (folder / CONFIG).unlink(missing_ok=True)  # of a part, or of another model


def _replace_tokenizer(plan: ExportPlan, folder: Path) -> None:
    """Put the tokenizer that the checkpoint was trained with in place of its origin's, which may
    have changed since, or be gone."""
    if plan.tokenizer is None or "language_model" not in plan.folder_format.parts:
        return
    for file in tokenizer_copy.tokenizer_files(folder):
        if file.name != CONFIG:
            file.unlink()
    for file in tokenizer_copy.tokenizer_files(plan.tokenizer):
        if file.name != CONFIG:
            shutil.copyfile(file, folder / file.name)


def _passthrough(plan: ExportPlan) -> SafetensorsSource | None:
    """Tensors of the original folder that the model does not use."""
    if plan.like is None:
        return None
    folder = plan.like / sidecar_files.PASSTHROUGH
    if not folder.exists():
        return None
    return SafetensorsSource(folder)


def _write_tensors(plan: ExportPlan, folder: Path) -> None:
    groups: list[Mapping[str, TensorInfo]] = [
        transfer.their_infos(folder) for transfer in plan.transfers
    ]
    passthrough = _passthrough(plan)
    if passthrough is not None:
        groups.append(passthrough.infos)
    writer = SafetensorsWriter(folder, groups, largest=LARGEST_FILE)
    with ProgressBar(
        "writing", nbytes=sum(transfer.nbytes for transfer in plan.transfers)
    ) as progress:
        for transfer in plan.transfers:
            for names, rows in transfer.portions():
                # Checked on the way out too: training may have produced NaN.
                ours = read_ours(plan.source, transfer, rows)
                check_finite(ours, name=transfer.location.key, file=plan.source.folder)
                # rows of a concatenated tensor are one of theirs already
                theirs = transfer.split(ours) if rows is None else {names[0]: ours}
                for name, tensor in theirs.items():
                    writer.write(name, tensor)
                    progress.advance(tensor.nbytes)
            plan.source.release(transfer.location)
        if passthrough is not None:
            for name in passthrough.infos:
                writer.write(name, passthrough.read(name))
        writer.close()


def read_ours(source: DistSource, transfer: Transfer, rows: Rows = None) -> Tensor:
    """Read a tensor of the checkpoint, or some rows of it, without padding of the vocabulary."""
    if rows is not None:
        return source.read(transfer.location, rows)
    tensor = source.read(transfer.location)
    # Only a vocabulary can be larger: it is padded to a multiple that TP ranks can share.
    if tensor.shape == torch.Size(transfer.shape):
        return tensor
    return tensor[: transfer.shape[0]]
