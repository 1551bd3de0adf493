"""What the tables of the families are made of: their names, our name, and how the tensor is cut."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Reshape:
    """How tensors of theirs make up one of ours. `split` undoes `join`, bit by bit."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Theirs, in the order of the rule -> ours."""
        (whole,) = parts
        return whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """Ours -> theirs."""
        return [whole]


@dataclass(frozen=True)
class FusedQKV(Reshape):
    """Query, key and value, row by row -> for each query group its queries, its key and its
    value."""

    groups: int
    queries: int  # of a group

    def join(self, parts: list[Tensor]) -> Tensor:
        """[heads * d, ...], [groups * d, ...] twice -> [(heads + 2 groups) * d, ...]."""
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(
            0, 1
        )

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        rows = whole.unflatten(0, (self.groups, self.queries + 2, -1))
        bounds = (
            (0, self.queries),
            (self.queries, self.queries + 1),
            (self.queries + 1, self.queries + 2),
        )
        return [rows[:, start:stop].flatten(0, 2) for start, stop in bounds]


@dataclass(frozen=True)
class Concat(Reshape):
    """Tensors of one shape, one after another along the first axis: gate and up."""

    count: int = 2

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return torch.cat(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return list(whole.chunk(self.count))


class Stack(Reshape):
    """Tensors of one shape along a new first axis: query, key and value of a vision layer."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return torch.stack(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return list(whole.unbind())


class UnflattenQKV(Reshape):
    """One tensor whose first axis we fold into [3, ...]: query, key and value that lie together
    already."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return parts[0].unflatten(0, (3, -1))

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return [whole.flatten(0, 1)]


@dataclass(frozen=True)
class Unsqueeze(Reshape):
    """One tensor to which we add leading axes of size 1."""

    axes: int

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return parts[0][(None,) * self.axes]

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return [whole.flatten(0, self.axes)]


UNCHANGED = Reshape()


@dataclass(frozen=True)
class Rule:
    """One row of a table. `{i}` in names stands for the number of a layer."""

    theirs: tuple[str, ...]
    ours: str
    reshape: Reshape = UNCHANGED

    def of_layer(self, i: int) -> "Rule":
        """The row with the layer's number filled in."""
        theirs = tuple(name.replace("{i}", str(i)) for name in self.theirs)
        return replace(self, theirs=theirs, ours=self.ours.replace("{i}", str(i)))


def row(theirs: str | tuple[str, ...], ours: str, reshape: Reshape = UNCHANGED) -> Rule:
    """A row; one name of theirs may be given as it is."""
    return Rule((theirs,) if isinstance(theirs, str) else theirs, ours, reshape)


def expand(
    rules: Iterable[Rule], *, layers: int, theirs: str = "", ours: str = ""
) -> Iterator[Rule]:
    """Rows for every layer, with prefixes `theirs` and `ours` before the names of either side."""
    for rule in rules:
        prefixed = Rule(
            tuple(theirs + name for name in rule.theirs), ours + rule.ours, rule.reshape
        )
        if "{i}" in rule.ours:
            yield from (prefixed.of_layer(i) for i in range(layers))
        else:
            yield prefixed


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies in a distributed checkpoint: megatron-core stacks the decoder's layers
    along a first axis."""

    key: str
    layer: int | None = None


_DECODER_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)\.(.*)")


def location_of(ours: str) -> TensorLocation:
    """The place of a tensor of ours."""
    found = _DECODER_LAYER.fullmatch(ours)
    if found:
        return TensorLocation(found[1] + found[3], int(found[2]))
    return TensorLocation(ours)
