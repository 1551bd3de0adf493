"""A folder of checkpoints, each written under a temporary name and renamed when complete.

<folder>/step_00000500/   distributed tensors, manifest.json, a copy of the tokenizer
<folder>/latest           name of the newest complete checkpoint; updated last
"""

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
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

from megatron_vita.checkpoint.space import HALVES, bytes_in, check_space, describe_lack, free_bytes
from megatron_vita.checkpoint.tokenizer_copy import copy_tokenizer
from megatron_vita.config import ModelConfig
from megatron_vita.errors import CheckpointError
from megatron_vita.files import atomic_write
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.platform.saving import take_write_failure, use_local_results_queue

use_local_results_queue()
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
FULL = 1 << 16
"""Bytes that are free where nothing fits any more."""
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
    size: int = 0,
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
        size: estimated bytes of the tensors of all ranks; 0 if unknown.

    Returns:
        Path of the checkpoint.

    Raises:
        CheckpointError: on all ranks, if it cannot be written; nothing is left of it.
    """
    folder = Path(folder)
    final = folder / f"step_{step:08d}"
    temporary = folder / f".step_{step:08d}.incomplete"
    _by_first(lambda: _begin(temporary, size=size))
    _write_tensors(state, temporary, size=size)
    manifest = {"format_version": FORMAT_VERSION, "step": step, **manifest}
    _by_first(lambda: _complete(temporary, final, manifest=manifest, tokenizer=tokenizer))
    _by_first(lambda: _prune(folder, keep, newest=final))
    return final


def _by_first(action: Callable[[], None]) -> None:
    """Run `action` on the first rank while the others wait. Collective.

    Raises:
        CheckpointError: on all ranks, if it fails with an OSError or a CheckpointError.
    """
    problem = [""]
    if _first():
        try:
            action()
        except (OSError, CheckpointError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])


def _begin(temporary: Path, *, size: int) -> None:
    """Create the folder to write to, after removing what a killed job left behind."""
    folder = temporary.parent
    for left_behind in folder.glob(HALVES):
        shutil.rmtree(left_behind, ignore_errors=True)
    check_space(folder, size=size)
    temporary.mkdir(parents=True)


def _write_tensors(state: dict[str, Any], temporary: Path, *, size: int) -> None:
    """Write the tensors of all ranks, or remove what was written and raise CheckpointError."""
    replicas = groups.data_parallel_group(with_context_parallel=True)
    # Ranks with the same shard of the model divide its tensors among them: none writes all.
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), replicas)
    try:
        dist_checkpointing.save(
            state,
            str(temporary),
            sharded_strategy=strategy,
            # The strategy checks it itself, after it has decided which rank writes which tensor.
            validate_access_integrity=False,
            async_strategy="mcore",
        )
    except CheckpointException as error:  # on all ranks
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, take_write_failure())
        reason = next(filter(None, reasons), str(error).strip().rpartition("\n")[2])
        _by_first(lambda: _give_up(temporary, size=size, reason=reason))
    except OSError as error:  # on the first rank alone, which writes what describes the rest
        _give_up(temporary, size=size, reason=str(error))


def _give_up(temporary: Path, *, size: int, reason: str) -> None:
    """Remove half a checkpoint, which would keep the disk full, and raise CheckpointError."""
    folder = temporary.parent
    written = bytes_in(temporary)
    free = free_bytes(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    if free < FULL or written + free < size:
        reason = describe_lack(max(size, written), free=written + free)
    raise CheckpointError(f"checkpoint.save {folder}: {reason}; nothing is left of it")


def _complete(temporary: Path, final: Path, *, manifest: dict[str, Any], tokenizer: str) -> None:
    """Add manifest and tokenizer, and make it the latest."""
    try:
        if tokenizer:
            copy_tokenizer(tokenizer, temporary)
        _write_text(temporary / MANIFEST, json.dumps(manifest))
    except OSError as error:
        _give_up(temporary, size=0, reason=str(error))
    # A run resumed from an earlier step reaches this one again.
    if final.exists():
        _remove(final)
    # In this order, `latest` names a complete checkpoint at any moment, and an older one is
    # deleted only after it is no longer the one to resume from.
    temporary.rename(final)
    _write_text(final.parent / "latest", final.name)


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


def is_saved(path: Path) -> bool:
    """Tell whether `path` is named like a checkpoint of a run and is not a link."""
    return bool(_NAME.fullmatch(path.name)) and not path.is_symlink()


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


def check_model(checkpoint: Path, *, saved: ModelConfig, model: ModelConfig) -> None:
    """Check that a checkpoint's model, `saved`, has the shapes of `model`.

    A text-only model may load the language model of a whole one.

    Raises:
        CheckpointError: names the first field that differs.
    """
    found = _flatten(dataclasses.asdict(saved))
    free: tuple[str, ...] = ()
    if model.text_only:
        free = ("text_only", "vision.", "projector.")
    for name, value in _flatten(dataclasses.asdict(model)).items():
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
    with atomic_write(path) as partial:
        partial.write_text(text)


def _prune(folder: Path, keep: int, *, newest: Path) -> None:
    """Delete all but the `keep` checkpoints up to `newest`.

    Later steps (of a run resumed from before them) are kept, and so is anything not named step_N or
    linked there, such as a copy.
    """
    saved = [path for path in folder.iterdir() if is_saved(path)]
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
