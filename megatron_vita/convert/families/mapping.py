"""Building blocks of the mapping tables: their tensor names, our name, and the reshape between
them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Reshape:
    """Reshape of Hugging Face tensors ("theirs") into one of ours. `split` inverts `join` bit by
    bit."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Convert their tensors, in the order of the rule, to ours."""
        (whole,) = parts
        return whole

    def split(self, whole: Tensor) -> list[Tensor]:
        """Convert our tensor to theirs."""
        return [whole]


@dataclass(frozen=True)
class FusedQKV(Reshape):
    """Query, key and value weights fused as megatron-core does: for each query group its queries,
    its key and its value."""

    groups: int
    queries: int  # of a group

    def join(self, parts: list[Tensor]) -> Tensor:
        """Fuse [heads * d, ...] and twice [groups * d, ...] to [(heads + 2 * groups) * d, ...]."""
        # Concatenating inside each group keeps a group's rows together, so that TP ranks can split
        # them.
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
    """Tensors of one shape concatenated along the first axis, such as gate and up."""

    count: int = 2

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return torch.cat(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return list(whole.chunk(self.count))


class Stack(Reshape):
    """Tensors of one shape stacked along a new first axis: query, key and value of a vision layer."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return torch.stack(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return list(whole.unbind())


class UnflattenQKV(Reshape):
    """One fused tensor [3 * d, ...] unflattened to [3, d, ...]: query, key and value."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return parts[0].unflatten(0, (3, -1))

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return [whole.flatten(0, 1)]


@dataclass(frozen=True)
class Unsqueeze(Reshape):
    """One tensor with leading axes of size 1 added."""

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
    """One row of a mapping table. `{i}` in names stands for the layer's number."""

    theirs: tuple[str, ...]
    ours: str
    reshape: Reshape = UNCHANGED

    def of_layer(self, i: int) -> "Rule":
        """Return the rule with the layer's number filled in."""
        theirs = tuple(name.replace("{i}", str(i)) for name in self.theirs)
        return replace(self, theirs=theirs, ours=self.ours.replace("{i}", str(i)))


def row(theirs: str | tuple[str, ...], ours: str, reshape: Reshape = UNCHANGED) -> Rule:
    """Build a rule; a single name on their side may be given as a string."""
    return Rule((theirs,) if isinstance(theirs, str) else theirs, ours, reshape)


def expand(
    rules: Iterable[Rule], *, layers: int, theirs: str = "", ours: str = ""
) -> Iterator[Rule]:
    """Yield the rules of every layer, with the prefixes `theirs` and `ours` before the names."""
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
    """Key of a tensor in a distributed checkpoint, and its layer: megatron-core stacks the tensors
    of the decoder's layers along a first axis."""

    key: str
    layer: int | None = None


# Only the language model's decoder is stacked; vision layers have keys of their own.
_DECODER_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)\.(.*)")


def location_of(ours: str) -> TensorLocation:
    """Location of one of our tensors, from its name in the module."""
    found = _DECODER_LAYER.fullmatch(ours)
    if found:
        return TensorLocation(found[1] + found[3], int(found[2]))
    return TensorLocation(ours)
