"""A folder of checkpoints, each written under a temporary name and renamed when complete.

<folder>/step_00000500/   distributed tensors, manifest.json, a copy of the tokenizer
<folder>/latest           name of the newest complete checkpoint; updated last
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import base, reading
from megatron_vita.checkpoint.manifest import MANIFEST, check_files, read_manifest
from megatron_vita.checkpoint.retention import Retention, is_saved, step_of
from megatron_vita.checkpoint.saver import LATEST, Saver
from megatron_vita.config import ModelConfig, Recipe, recipe_from_dict
from megatron_vita.errors import CheckpointError, DamagedCheckpointError
from megatron_vita.model.quantized import unpacked_in_turn
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups

logger = logging.getLogger(__name__)


def sharding_metadata() -> dict[str, Any]:
    """Return the metadata with which megatron-core's modules and optimizers describe their shards.

    Optimizer state is written so that any layout can read it.
    """
    return {
        "dp_cp_group": groups.data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    state: dict[str, Any],
    manifest: dict[str, Any],
    keep: int,
    tokenizer: str = "",
    size: int = 0,
) -> Path:
    """Write a sharded `state` as the newest checkpoint and delete all but the `keep` newest.
    Collective.

    Args and errors are those of `Saver`.

    Returns:
        Path of the checkpoint.
    """
    saver = Saver(Path(folder), retention=Retention(last=keep), tokenizer=tokenizer, size=size)
    saver.start(step=step, state=state, manifest=manifest)
    return saver.finish()


def latest_name(folder: str | Path) -> str:
    """Return the name of the latest checkpoint of a folder; empty if none is named.

    Raises:
        CheckpointError: `latest` cannot be read.
    """
    try:
        return (Path(folder) / LATEST).read_text().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(folder) / LATEST}: cannot be read: {error}") from error


def latest_checkpoint(
    folder: str | Path, *, up_to: int | None = None, damaged: Mapping[str, str] | None = None
) -> Path | None:
    """Return the newest whole checkpoint in `folder`, or None if there is no checkpoint.

    It is the one that `latest` names, or the newest before it that is whole. What is skipped is
    logged with the reason.

    Args:
        folder: parent of the checkpoints.
        up_to: step of the newest that may be returned; None: any.
        damaged: names of those known to be damaged, and what is wrong with them.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    damaged = damaged or {}
    skipped: list[str] = []
    for path in _candidates(Path(folder)):
        if up_to is not None and step_of(path.name) > up_to:
            continue
        reason = damaged.get(path.name) or _damage_of(path)
        if not reason:
            for line in skipped:
                logger.warning("%s: skipped: %s", folder, line)
            return path
        skipped.append(reason)
    if skipped:
        raise CheckpointError(f"{folder}: no checkpoint is whole: {'; '.join(skipped)}")
    return None


def from_first(find: Callable[[], str]) -> str:
    """Return the first rank's result of `find` on all ranks. Collective, if there is a process
    group.

    Raises:
        CheckpointError: on all ranks, as `find` raises it on the first.
    """
    if not dist.is_initialized():
        return find()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except CheckpointError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    name: str = found[0]
    return name


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints that may be resumed from, the preferred one first."""
    if not folder.is_dir():
        return []
    saved = sorted((path for path in folder.iterdir() if is_saved(path)), reverse=True)
    latest = latest_name(folder)
    if not latest:
        # A kill came between the first checkpoint and the first `latest`.
        return saved
    # Later ones are of a run that was set back to an earlier step.
    return [folder / latest, *(path for path in saved if path.name < latest)]


def _damage_of(checkpoint: Path) -> str:
    """Return why a checkpoint is not whole; empty if nothing shows without reading its tensors."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is missing"
    try:
        check_files(checkpoint, read_manifest(checkpoint))
    except DamagedCheckpointError as error:
        return str(error)
    return ""


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest whole checkpoint in it.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            f"{path}: neither a checkpoint (no {MANIFEST}) nor a folder of checkpoints (no `latest`)"
        )
    return newest


ROTARY: tuple[str, ...] = ("language.rotary_base", "language.rope_scaling.")
"""Fields of a model that set the angles of positions: no weight's shape depends on them."""


def check_model(
    checkpoint: Path, *, saved: ModelConfig, model: ModelConfig, may_differ: tuple[str, ...] = ()
) -> None:
    """Check that a checkpoint's model, `saved`, has the shapes of `model`.

    A text-only model may load the language model of a whole one.

    Args:
        may_differ: beginnings of the names of further fields that may differ.

    Raises:
        CheckpointError: names the first field that differs.
    """
    found = _flatten(dataclasses.asdict(saved))
    free = may_differ
    if model.text_only:
        free += ("text_only", "vision.", "projector.")
    for name, value in _flatten(dataclasses.asdict(model)).items():
        # How weights were initialized does not change their shapes.
        if name.startswith(free) or name.endswith(("init", "init_method_std")):
            continue
        if found.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: holds another model: model.{name} is {found.get(name)} there and "
                f"{value} in the recipe"
            )


def recipe_of(checkpoint: Path) -> Recipe:
    """Return the recipe of a checkpoint that holds a whole model.

    Raises:
        CheckpointError: it holds adapters alone, or its manifest cannot be read.
    """
    manifest = read_manifest(checkpoint)
    base.check_whole(checkpoint, manifest)
    return recipe_from_dict(manifest["recipe"])


def load_state(
    checkpoint: Path,
    state: dict[str, Any],
    *,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fill a sharded `state` from a checkpoint written by any layout. Collective.

    on_progress: called for each tensor that this rank reads.

    Raises:
        DamagedCheckpointError: on all ranks, if what is read is not what was written.
        CheckpointError: on all ranks, if the checkpoint does not hold what is asked for.
    """
    manifest = read_manifest(checkpoint)
    return reading.load_state(checkpoint, state, manifest=manifest, on_progress=on_progress)


def model_state(chunks: list[VitaModel]) -> dict[str, Any]:
    """Return the sharded state of a rank's model chunks."""
    return {
        str(i): chunk.sharded_state_dict(metadata=sharding_metadata())
        for i, chunk in enumerate(chunks)
    }


def set_model_state(chunks: list[VitaModel], state: dict[str, Any]) -> None:
    """Load a rank's model chunks from a loaded state."""
    for i, chunk in enumerate(chunks):
        # Not strict: `_extra_state` of Transformer Engine's modules is not saved.
        chunk.load_state_dict(state[str(i)], strict=False)


def load_weights(
    chunks: list[VitaModel],
    checkpoint: Path,
    *,
    with_adapters: bool = True,
    on_part: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Load a model's weights from a checkpoint written by any layout. Collective.

    Weights that are kept in 4 bits are loaded and packed a layer at a time.

    with_adapters: load the model's adapters too, if it has any; the checkpoint must hold them.
    on_part: called with the sharded state of what has been loaded, part by part.
    """

    def described() -> dict[str, Any]:
        state = model_state(chunks)
        return state if with_adapters else base.base_state(state)

    set_model_state(chunks, load_state(checkpoint, {"model": described()})["model"])
    if on_part is not None:
        # Described anew: loading changes which of several ranks is a tensor's main one.
        on_part(described())
    manifest = read_manifest(checkpoint)
    for names in _quantized_names(chunks):
        part = base.named_state(model_state(chunks), names)
        reading.fill_part(checkpoint, part, manifest=manifest)
        if on_part is not None:
            on_part(part)


def _quantized_names(chunks: list[VitaModel]) -> Iterator[dict[str, set[str]]]:
    """Yield the names of quantized weights by chunk, layer by layer, as often on all ranks.

    They can be written to until the next are asked for. Collective.
    """
    if not any(chunk.quantized for chunk in chunks):
        return
    mine = sum(len(chunk.language_model.decoder.layers) for chunk in chunks)
    most = torch.tensor(mine, device=platform.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    for i, chunk in enumerate(chunks):
        for names in unpacked_in_turn(chunk):
            yield {str(i): names}
    # Other pipeline stages may have more layers.
    for _ in range(mine, int(most)):
        yield {}


def load_adapters(chunks: list[VitaModel], checkpoint: Path, *, saved: Recipe) -> None:
    """Load adapters, and the parts that were trained fully beside them by recipe `saved`.
    Collective."""
    state = {"model": base.adapters_state(model_state(chunks), saved)}
    set_model_state(chunks, load_state(checkpoint, state)["model"])


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
