"""A folder of checkpoints, each written under a temporary name and renamed when complete.

<folder>/step_00000500/   distributed tensors, manifest.json, a copy of the tokenizer
<folder>/latest           name of the newest complete checkpoint; moves last
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
    """What megatron-core's modules and optimizers ask for in order to describe their shards.

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
    """Writes a sharded `state`, its `manifest` (plain values) and a copy of the `tokenizer` as the
    newest checkpoint; keeps the `keep` newest.

    Collective. A kill at any moment leaves the last complete checkpoint as the latest.
    """
    folder = Path(folder)
    final = folder / f"step_{step:08d}"
    temporary = folder / f".step_{step:08d}.incomplete"
    if _first():
        # by a job that was killed while it saved or removed
        for left_behind in folder.glob(".step_*.incomplete"):
            shutil.rmtree(left_behind, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    replicas = groups.data_parallel_group(with_context_parallel=True)
    # each writes its share
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), replicas)
    dist_checkpointing.save(
        state,
        str(temporary),
        sharded_strategy=strategy,
        validate_access_integrity=False,  # the strategy does, once it is known who writes what
        async_strategy="mcore",
    )
    dist.barrier()
    if _first():
        if tokenizer:
            copy_tokenizer(tokenizer, temporary)
        _write_text(
            temporary / MANIFEST,
            json.dumps({"format_version": FORMAT_VERSION, "step": step, **manifest}),
        )
        if final.exists():
            _remove(final)
        temporary.rename(final)
        _write_text(folder / "latest", final.name)
        _prune(folder, keep, newest=final)
    dist.barrier()
    return final


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None if there is none."""
    pointer = Path(folder) / "latest"
    if not pointer.exists():
        return None
    path = Path(folder) / pointer.read_text().strip()
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{pointer} names {path.name}, which is missing or incomplete")
    return path


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest in it; CheckpointError if there is
    none."""
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
    """The manifest of a checkpoint; CheckpointError if it cannot be read or is of another format
    version."""
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
    """CheckpointError, naming the first field that differs, unless the checkpoint is of the same
    model shapes.

    A text-only model may be the language model of a whole one.
    """
    found = _flatten(
        dataclasses.asdict(recipe_from_dict(read_manifest(checkpoint)["recipe"]).model)
    )
    free = ("text_only", "vision.", "projector.") if model["text_only"] else ()
    for name, value in _flatten(model).items():
        if name.startswith(free) or name.endswith(("init", "init_method_std")):
            continue
        if found.get(name) != value:
            raise CheckpointError(
                f"{checkpoint}: is of another model: model.{name} is {found.get(name)} there and {value} in the recipe"
            )


def load_state(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fills a sharded `state` from a checkpoint, whatever layout wrote it. Collective."""
    try:
        return dist_checkpointing.load(
            state, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED
        )
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(f"{checkpoint}: cannot be loaded: {reason[0]}") from error


def model_state(chunks: list[VitaModel]) -> dict[str, Any]:
    """The sharded state of a rank's chunks of the model."""
    return {
        str(i): chunk.sharded_state_dict(metadata=sharding_metadata())
        for i, chunk in enumerate(chunks)
    }


def set_model_state(chunks: list[VitaModel], state: dict[str, Any]) -> None:
    """Sets the weights of a rank's chunks from a loaded state."""
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[str(i)], strict=False)


def load_weights(chunks: list[VitaModel], checkpoint: Path) -> None:
    """Sets a model's weights from a checkpoint of any layout. Collective."""
    state = load_state(checkpoint, {"model": model_state(chunks)})
    set_model_state(chunks, state["model"])


def _first() -> bool:
    return dist.get_rank() == 0


def _write_text(path: Path, text: str) -> None:
    """Writes and moves into place, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.incomplete")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _prune(folder: Path, keep: int, *, newest: Path) -> None:
    """Later steps than the newest are of a run that was taken up again before them: they stay, and
    so does what was not saved here under this name, such as a copy or a link.
    """
    saved = [
        path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.is_symlink()
    ]
    for old in sorted(path for path in saved if path.name <= newest.name)[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Hides it first: a kill must not leave half of it under its name. What resists stays, with a
    warning."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.{time.time_ns()}.incomplete")
    try:
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", checkpoint, error)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat
