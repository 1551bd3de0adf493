"""A folder of checkpoints, each written under a temporary name and renamed when complete.

<folder>/step_00000500/   distributed tensors, manifest.json, a copy of the tokenizer
<folder>/latest           name of the newest complete checkpoint; updated last
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vita.checkpoint.tokenizer_copy import copy_tokenizer
from megatron_vita.config import recipe_from_dict
from megatron_vita.errors import CheckpointError
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.platform.saving import write_without_a_manager

write_without_a_manager()
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_\d{8,}")
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
) -> Path:
    """Write a sharded `state` as the newest checkpoint and delete all but the `keep` newest.
    Collective.

    A kill at any moment leaves the last complete checkpoint as the latest.

    Args:
        folder: parent of all checkpoints of the run.
        step: optimizer steps done; names the checkpoint.
        state: megatron-core's sharded state.
        manifest: plain values for manifest.json.
        keep: number of checkpoints to retain.
        tokenizer: path of a tokenizer to copy into the checkpoint; empty for none.

    Returns:
        Path of the checkpoint.
    """
    folder = Path(folder)
    final = folder / f"step_{step:08d}"
    temporary = folder / f".step_{step:08d}.incomplete"
    if _first():
        # of a job that was killed while it saved or deleted
        for left_behind in folder.glob(".step_*.incomplete"):
            shutil.rmtree(left_behind, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _save_shards(state, temporary)
    dist.barrier()
    if _first():
        if tokenizer:
            copy_tokenizer(tokenizer, temporary)
        _write_text(
            temporary / MANIFEST,
            json.dumps({"format_version": FORMAT_VERSION, "step": step, **manifest}),
        )
        # A run resumed from an earlier step reaches this one again.
        if final.exists():
            _remove(final)
        # In this order, `latest` names a complete checkpoint at any moment, and an older one is
        # deleted only after it is no longer the one to resume from.
        temporary.rename(final)
        _write_text(folder / "latest", final.name)
        _prune(folder, keep, newest=final)
    dist.barrier()
    return final


def _save_shards(state: dict[str, Any], folder: Path) -> None:
    replicas = groups.data_parallel_group(with_context_parallel=True)
    # Ranks with the same shard of the model divide its tensors among them: none writes all.
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), replicas)
    dist_checkpointing.save(
        state,
        str(folder),
        sharded_strategy=strategy,
        # The strategy checks it itself, after it has decided which rank writes which tensor.
        validate_access_integrity=False,
        async_strategy="mcore",
    )


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None if there is none.

    Raises:
        CheckpointError: `latest` names a checkpoint that is missing or incomplete.
    """
    pointer = Path(folder) / "latest"
    if not pointer.exists():
        return None
    path = Path(folder) / pointer.read_text().strip()
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{pointer} names {path.name}, which is missing or incomplete")
    return path


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint in it.

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


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it cannot be read or has another format version.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: cannot be read: {error}") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: format version {version}; this version reads {FORMAT_VERSION}"
        )
    return manifest


def check_model(checkpoint: Path, *, model: dict[str, Any]) -> None:
    """Check that a checkpoint holds a model of the same shapes.

    A text-only model may load the language model of a whole one.

    Raises:
        CheckpointError: names the first field that differs.
    """
    found = _flatten(
        dataclasses.asdict(recipe_from_dict(read_manifest(checkpoint)["recipe"]).model)
    )
    free = ("text_only", "vision.", "projector.") if model["text_only"] else ()
    for name, value in _flatten(model).items():
        # How weights were initialized does not change their shapes.
        if name.startswith(free) or name.endswith(("init", "init_method_std")):
            continue
        if found.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: holds another model: model.{name} is {found.get(name)} there and "
                f"{value} in the recipe"
            )


def load_state(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded `state` from a checkpoint written by any layout. Collective.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    # A state may ask for less than the checkpoint holds (weights without optimizer, a language
    # model without tower), but not for more.
    strict = StrictHandling.RAISE_UNEXPECTED
    try:
        return dist_checkpointing.load(state, str(checkpoint), strict=strict)
    except (Exception, CheckpointException) as error:  # torch's derives from BaseException
        # torch's message lists the traceback of every rank; its last line is the cause.
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(f"{checkpoint}: cannot be loaded: {reason[0]}") from error


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


def load_weights(chunks: list[VitaModel], checkpoint: Path) -> None:
    """Load a model's weights from a checkpoint written by any layout. Collective."""
    state = load_state(checkpoint, {"model": model_state(chunks)})
    set_model_state(chunks, state["model"])


def _first() -> bool:
    return dist.get_rank() == 0


def _write_text(path: Path, text: str) -> None:
    """Write to a temporary file and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.incomplete")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _prune(folder: Path, keep: int, *, newest: Path) -> None:
    """Delete all but the `keep` checkpoints up to `newest`.

    Later steps (of a run resumed from before them) are kept, and so is anything not named step_N or
    linked there, such as a copy.
    """
    saved = [
        path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.is_symlink()
    ]
    for old in sorted(path for path in saved if path.name <= newest.name)[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it; log a warning if it cannot be deleted.

    The rename first: a kill must not leave half of it under its name.
    """
    hidden = checkpoint.with_name(f".{checkpoint.name}.{time.time_ns()}.incomplete")
    try:
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", checkpoint, error)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
