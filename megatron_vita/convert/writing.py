"""Writer of a converted checkpoint: weights, sidecar files, manifest, and a recipe to build on."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megatron_vita.checkpoint.manifest import FORMAT_VERSION, MANIFEST
from megatron_vita.config import Recipe
from megatron_vita.convert.folders import new_folder
from megatron_vita.convert.formats.tensors import TensorSource, check_finite
from megatron_vita.convert.formats.torch_dist_writer import TensorChunk, write_distributed
from megatron_vita.convert.progress import ProgressBar
from megatron_vita.convert.settings.sidecar_files import FOLDER, has_tokenizer
from megatron_vita.convert.transfers import Rows, Transfer

RECIPE = "model.yaml"


def write_checkpoint(
    destination: Path,
    transfers: list[tuple[Transfer, TensorSource]],
    *,
    recipe: Recipe,
    sidecar_files: Mapping[str, Callable[[Path], None]],
    tokenizer: str,
) -> None:
    """Write a checkpoint, completely or not at all.

    Args:
        recipe: the settings that the sources give; its tokenizer path is set here.
        sidecar_files: functions that write the accompanying files, by the name of their folder.
        tokenizer: the name of the folder with the tokenizer.
    """
    with new_folder(destination) as folder:
        with ProgressBar(
            "reading", nbytes=sum(transfer.nbytes for transfer, _ in transfers)
        ) as progress:
            write_distributed(folder, _chunks(transfers, progress))
        for name, write in sidecar_files.items():
            write(folder / FOLDER / name)
        place = Path(FOLDER) / tokenizer
        found = str(place) if has_tokenizer(folder / place) else ""
        recipe = recipe.replaced({"text.tokenizer": found})
        (folder / RECIPE).write_text(_as_yaml(recipe, destination))
        write_first_manifest(folder, recipe)


def _chunks(
    transfers: list[tuple[Transfer, TensorSource]], progress: ProgressBar
) -> list[TensorChunk]:
    """Chunks to write: whole tensors or layers, or parts of them where theirs are concatenated."""
    return [
        _chunk(transfer, source, names=names, rows=rows, progress=progress)
        for transfer, source in transfers
        for names, rows in transfer.portions()
    ]


def _chunk(
    transfer: Transfer,
    source: TensorSource,
    *,
    names: tuple[str, ...],
    rows: Rows,
    progress: ProgressBar,
) -> TensorChunk:
    def read(name: str) -> Tensor:
        tensor = source.read(name)
        check_finite(tensor, name=name, file=source.infos[name].file)
        return tensor

    def done() -> None:
        for name in names:
            source.release(name)
            progress.advance(source.infos[name].nbytes)

    return TensorChunk(
        location=transfer.location,
        rows=rows,
        whole=transfer.whole,
        dtype=transfer.dtype,
        make=lambda: (transfer.join(read) if rows is None else read(names[0])).contiguous(),
        done=done,
    )


def write_first_manifest(
    folder: Path, recipe: Recipe, more: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of a checkpoint that no run has trained yet.

    Args:
        folder: the checkpoint.
        recipe: model and settings.
        more: further fields.
    """
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "consumed_packs": 0,
        "recipe": dataclasses.asdict(recipe),
    }
    (folder / MANIFEST).write_text(json.dumps(values | dict(more or {})))


def _as_yaml(recipe: Recipe, destination: Path) -> str:
    """Recipe groups that a training stage starting from these weights can use as its base."""
    if recipe.text.tokenizer:
        # Relative paths in a recipe are taken from the working folder, not from the recipe's.
        place = str(destination.absolute() / recipe.text.tokenizer)
        recipe = recipe.replaced({"text.tokenizer": place})
    groups = {"model": dataclasses.asdict(recipe.model)}
    for name in ("text", "media", "generation"):
        if stated := _stated(getattr(recipe, name)):
            groups[name] = stated
    return (
        "# The shapes of these weights and what their origin says of pixels and answers: name this\n"
        "# file as a base of a stage's recipe.\n" + yaml.safe_dump(groups)
    )


def _stated(group: Any) -> dict[str, Any]:
    """Fields of a group that differ from their defaults."""
    usual = dataclasses.asdict(type(group)())
    return {n: v for n, v in dataclasses.asdict(group).items() if v != usual[n]}
