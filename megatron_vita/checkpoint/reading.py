"""Loading of a checkpoint by all ranks: each tensor is read and verified once, and exchanged."""

import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_vita.checkpoint.index_file import parse_index
from megatron_vita.checkpoint.manifest import FILES, INDEX, Span, check_bytes, check_files
from megatron_vita.errors import CheckpointError, DamagedCheckpointError
from megatron_vita.parallel import groups
from megatron_vita.parallel.sharded_state import sharded_tensors
from megatron_vita.platform.saving import reading_with


def load_state(
    checkpoint: Path,
    state: dict[str, Any],
    *,
    manifest: dict[str, Any],
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fill a sharded `state` from a checkpoint written by any layout. Collective.

    Ranks that hold the same shard divide the reading among them.

    on_progress: called for each tensor that this rank reads.

    Raises:
        DamagedCheckpointError: on all ranks, if the bytes that one of them reads are not those
            that were written.
        CheckpointError: on all ranks, if it does not hold what is asked for.
    """
    return _load(checkpoint, state, manifest=manifest, on_progress=on_progress)


def fill_part(checkpoint: Path, state: dict[str, Any], *, manifest: dict[str, Any]) -> None:
    """Fill the tensors of a sharded `state` in place, as `load_state`. Collective.

    The ranks together may ask for less than whole tensors, such as one layer of those that are
    stacked, and some of them for nothing.
    """
    tensors = list(sharded_tensors(state))
    wanted = {str(i): _unstacked(tensor) for i, tensor in enumerate(tensors)}
    loaded = _load(checkpoint, wanted, manifest=manifest, in_part=True)
    with torch.no_grad():
        for i, tensor in enumerate(tensors):
            tensor.data.copy_(loaded[str(i)].view_as(tensor.data))


def _unstacked(tensor: ShardedTensor) -> ShardedTensor:
    """Describe a layer's tensor by all axes of the stacked ones: [1, ...].

    Of tensors that are described as stacked, megatron-core asks for all layers in a world of one.
    """
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return dataclasses.replace(
        tensor, data=tensor.data.detach().view(shape), local_shape=shape, prepend_axis_num=0
    )


def _load(
    checkpoint: Path,
    state: dict[str, Any],
    *,
    manifest: dict[str, Any],
    in_part: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    reader = CheckedReader(checkpoint, manifest.get(FILES, {}), on_progress=on_progress)
    replicas = groups.data_parallel_group(with_context_parallel=True)
    # A state may ask for less than the checkpoint holds (weights without optimizer, a language
    # model without tower), but not for more.
    strict = StrictHandling.RAISE_UNEXPECTED
    with reading_with(reader):
        _agree(_problem_before_load(reader, manifest))
        try:
            return dist_checkpointing.load(
                state,
                str(checkpoint),
                FullyParallelLoadStrategyWrapper(_AgreedLoad(), replicas),
                validate_access_integrity=not in_part,
                strict=strict,
            )
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:  # torch's derives from BaseException
            raise _describe(checkpoint, error) from error


class CheckedReader(FileSystemReader):
    """Reader of torch's distributed checkpoints that verifies what it reads.

    Args:
        folder: the checkpoint.
        files: spans of each file; one that is missing here is read as it is.
        on_progress: called for each tensor.
    """

    def __init__(
        self,
        folder: Path,
        files: dict[str, list[Span]],
        *,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(folder)
        self.folder = folder
        self._on_progress = on_progress
        self._spans = {
            name: {(offset, length): (offset, length, checksum) for offset, length, checksum in of}
            for name, of in files.items()
        }
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of all tensors, which is read once.

        Raises:
            DamagedCheckpointError: it is cut or altered.
        """
        if self._metadata is None:
            path = self.folder / INDEX
            data = path.read_bytes()
            for span in self._spans.get(INDEX, {}).values():
                check_bytes(data, path=path, span=span)
            self._metadata = parse_index(data)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for.

        Raises:
            UnpicklingError: an object would run code.
        """
        return super().read_data(plan, cast(LoadPlanner, _CheckingPlanner(planner)))

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        self._on_progress()
        span = self._spans.get(sinfo.relative_path, {}).get((sinfo.offset, sinfo.length))
        if span is None:
            return super()._slice_file(file, sinfo)
        data = _read(file.fileno(), offset=sinfo.offset, length=sinfo.length)
        check_bytes(data, path=self.folder / sinfo.relative_path, span=span)
        return io.BytesIO(data)


class _CheckingPlanner:
    """A planner that refuses objects that would run code.

    torch's planner unpickles anything; megatron-core asks for no code only after it.
    """

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        """Load an object, if it is made of plain values and tensors."""
        torch.load(value, weights_only=True)
        value.seek(0)
        self._planner.load_bytes(item, value)


def _read(descriptor: int, *, offset: int, length: int) -> bytes:
    """Read bytes of a file, fewer at its end, and none beyond them, as a buffered read would."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


class _AgreedLoad(TorchDistLoadShardedStrategy):
    """megatron-core's load of what this rank reads, which fails on all ranks if it does on one.

    A rank that failed alone would leave the others waiting in the exchange that follows.
    """

    def load(
        self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "mcore"
    ) -> Any:
        problem: CheckpointError | None = None
        loaded = None
        try:
            loaded = super().load(sharded_state_dict, checkpoint_dir, async_strategy)
        except (Exception, CheckpointException) as error:
            problem = _describe(Path(checkpoint_dir), error)
        _agree(problem)
        return loaded


def _problem_before_load(
    reader: CheckedReader, manifest: Mapping[str, Any]
) -> CheckpointError | None:
    """Return what is wrong with the files' sizes, on the first rank, and with the index, on each."""
    try:
        if dist.get_rank() == 0:
            check_files(reader.folder, manifest)
        reader.read_metadata()
    except Exception as error:
        return _describe(reader.folder, error)
    return None


def _agree(problem: CheckpointError | None) -> None:
    """Raise the first rank's problem on all ranks. Collective."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise first


def _describe(checkpoint: Path, error: BaseException) -> CheckpointError:
    """Return what an error in reading says of the checkpoint."""
    if isinstance(error, CheckpointException):
        # torch wraps the error of each rank, with its traceback.
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, OSError | EOFError | pickle.UnpicklingError):
        return DamagedCheckpointError(f"{checkpoint}: cannot be read: {error}")
    reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return CheckpointError(f"{checkpoint}: cannot be loaded: {reason[0]}")
