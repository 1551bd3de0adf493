"""Assignment of a source's tensors to ours, checked by shape and type before any tensor is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vita.convert.families.mapping import Concat, Rule, TensorLocation, location_of
from megatron_vita.convert.formats.tensors import FLOATS, TensorInfo
from megatron_vita.errors import CheckpointError

Rows = tuple[int, int] | None
Shapes = Mapping[str, tuple[int, ...]]
# that old files carry, and that are no weights
_BUFFERS = (".rotary_emb.inv_freq", ".position_ids")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One of our tensors, or one layer of it, and the rule that maps theirs to it."""

    rule: Rule
    location: TensorLocation
    whole: tuple[int, ...]  # shape under the key, its layers included
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without the axis of layers."""
        if self.location.layer is None:
            return self.whole
        return self.whole[1:]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def portions(self) -> Iterator[tuple[tuple[str, ...], Rows]]:
        """Yield the names of theirs that are moved together, with their rows of our tensor (None:
        all).

        Concatenated tensors are moved one by one, which saves a copy of the whole.
        """
        names = self.rule.theirs
        # Other reshapes interleave rows, so that all tensors are needed at once.
        if not isinstance(self.rule.reshape, Concat):
            yield names, None
            return
        rows = self.shape[0] // len(names)
        yield from (((name,), (i * rows, (i + 1) * rows)) for i, name in enumerate(names))

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Convert theirs to ours."""
        return self.rule.reshape.join([read(name) for name in self.rule.theirs])

    def split(self, ours: Tensor) -> dict[str, Tensor]:
        """Convert ours to theirs, by name."""
        return dict(zip(self.rule.theirs, self.rule.reshape.split(ours), strict=True))

    def their_infos(self, file: Path) -> dict[str, TensorInfo]:
        """Type and shape of their tensors by name, as they will be in `file`."""
        # The reshape itself, run on the meta device, tells the shapes.
        parts = self.split(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return {
            name: TensorInfo(file=file, dtype=self.dtype, shape=tuple(t.shape))
            for name, t in parts.items()
        }


def import_transfers(
    rules: Iterable[Rule], *, infos: Mapping[str, TensorInfo], shapes: Shapes, source: Path
) -> list[Transfer]:
    """Transfers from one source.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of a wrong shape or type; the message
            names tensor and file.
    """
    transfers = []
    for rule in rules:
        for name in rule.theirs:
            if name not in infos:
                raise CheckpointError(f"{source}: has no tensor {name}, which its config calls for")
        location = location_of(rule.ours)
        transfer = Transfer(
            rule=rule,
            location=location,
            whole=shapes[location.key],
            dtype=infos[rule.theirs[0]].dtype,
        )
        _check_theirs(transfer, infos)
        transfers.append(transfer)
    known = {name for transfer in transfers for name in transfer.rule.theirs}
    for name in infos.keys() - known:
        if not name.endswith(_BUFFERS):
            raise CheckpointError(
                f"{infos[name].file}: has tensor {name}, which its config does not call for"
            )
    _check_layers(transfers, infos)
    return transfers


def _check_theirs(transfer: Transfer, infos: Mapping[str, TensorInfo]) -> None:
    for name, expected in transfer.their_infos(Path()).items():
        found = infos[name]
        if found.dtype not in FLOATS:
            raise CheckpointError(
                f"{found.file}: tensor {name} is {_short(found.dtype)}; right are {', '.join(map(_short, FLOATS))}"
            )
        if found.shape != expected.shape:
            raise CheckpointError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}; the config says {list(expected.shape)}"
            )
        if found.dtype != expected.dtype:
            raise CheckpointError(
                f"{found.file}: tensor {name} is {_short(found.dtype)}, but {transfer.rule.theirs[0]}, "
                f"with which it is joined, is {_short(expected.dtype)}"
            )


def _check_layers(transfers: list[Transfer], infos: Mapping[str, TensorInfo]) -> None:
    """Check that all layers stacked under one key have one type."""
    first: dict[str, Transfer] = {}
    for transfer in transfers:
        # They are stored as one tensor.
        other = first.setdefault(transfer.location.key, transfer)
        if other.dtype != transfer.dtype:
            name = transfer.rule.theirs[0]
            like = other.rule.theirs[0]
            raise CheckpointError(
                f"{infos[name].file}: tensor {name} is {_short(transfer.dtype)}, but {like} of another layer is "
                f"{_short(other.dtype)}: one type is needed"
            )


def export_transfers(
    rules: Iterable[Rule], *, infos: Mapping[str, TensorInfo], shapes: Shapes, source: Path
) -> list[Transfer]:
    """Transfers out of a distributed checkpoint.

    Raises:
        CheckpointError: a tensor is missing or misshaped; the message names it.
    """
    transfers = []
    for rule in rules:
        location = location_of(rule.ours)
        found = infos.get(location.key)
        expected = shapes[location.key]
        if found is None:
            raise CheckpointError(
                f"{source}: has no tensor {location.key}, which its recipe calls for"
            )
        if found.shape != expected and not _is_padded(location.key, found.shape, expected):
            raise CheckpointError(
                f"{source}: tensor {location.key} has shape {list(found.shape)}; its recipe calls for {list(expected)}"
            )
        transfers.append(Transfer(rule=rule, location=location, whole=expected, dtype=found.dtype))
    return transfers


def _is_padded(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Tell whether a vocabulary matrix has extra rows, as tensor parallelism may require."""
    return (
        key.endswith(("word_embeddings.weight", "output_layer.weight"))
        and found[1:] == expected[1:]
        # Tuples compare by the first axis here, since the others are equal.
        and found > expected
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
