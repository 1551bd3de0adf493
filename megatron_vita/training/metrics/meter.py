"""Named metrics that ranks add to, reduced over all ranks at once.

Names need not be registered: when a rank uses a new one, all ranks exchange their names once.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita import platform
from megatron_vita.errors import ConfigError

Reduce = Literal["sum", "mean", "max", "min"]
_SIGNS: dict[str, int] = {"max": 1, "min": -1}  # a minimum is the negated maximum of the negated


@dataclass(kw_only=True)
class Timing:
    """Seconds that a block has taken, once it has ended."""

    seconds: float = 0.0


class Meter:
    """Values on this rank since the last reduction, by name."""

    def __init__(self) -> None:
        self._agreed: dict[str, Reduce] = {}  # the same on all ranks, in the same order
        self._reduces: dict[str, Reduce] = {}
        self._values: dict[str, float | Tensor] = {}
        self._counts: dict[str, float] = {}  # calls, or their weights

    def reduce_of(self, name: str) -> Reduce | None:
        """Return the reduction of `name` on this rank; None if it is unknown."""
        return self._reduces.get(name)

    def add(
        self, name: str, value: float | Tensor, *, reduce: Reduce = "sum", weight: float = 1.0
    ) -> None:
        """Add to the value of `name`.

        Args:
            name: name of the metric, with slashes for groups.
            value: a number, or a tensor of one, which is not waited for.
            reduce: reduction over the calls since the last one, on all ranks.
            weight: weight of this call in a `mean`.
        """
        known = self._reduces.setdefault(name, reduce)
        assert known == reduce, f"metric {name} is reduced by {known} elsewhere, by {reduce} here"
        if isinstance(value, Tensor):
            value = value.detach()
        else:
            value = float(value)
        if reduce == "mean" and weight != 1.0:
            value = value * weight
        before = self._values.get(name)
        if before is not None:
            value = _combine(before, value, reduce)
        self._counts[name] = self._counts.get(name, 0.0) + weight
        self._values[name] = value

    @contextmanager
    def timing(self, name: str) -> Iterator[Timing]:
        """Add the seconds that a block takes on the host; reduced to the largest sum of a rank."""
        timing = Timing()
        start = time.perf_counter()
        try:
            yield timing
        finally:
            timing.seconds = time.perf_counter() - start
            self._values[name] = self._values.get(name, 0.0) + timing.seconds
            self._counts[name] = 1
            self._reduces[name] = "max"

    def reduce(self) -> dict[str, float]:
        """Reduce over all ranks the names that any rank has added to since the last call.
        Collective.

        Empties the meter.

        Raises:
            ConfigError: on all ranks, if they reduce one name in different ways.
        """
        # Names rarely change: their exchange, slow since they are pickled, is skipped until some
        # rank's flag, in the same collective as the values, asks for it.
        has_new, extremes, totals = self._exchange()
        if has_new:
            self._agree()
            _, extremes, totals = self._exchange()
        self._values.clear()
        self._counts.clear()
        result = {}
        for name, reduce in self._agreed.items():
            value, calls = totals[name]
            if not calls:
                continue  # known from an earlier step, not added to in this one
            if reduce == "mean":
                value /= calls
            result[name] = extremes.get(name, value)
        return result

    def _exchange(self) -> tuple[bool, dict[str, float], dict[str, tuple[float, float]]]:
        """Return whether a rank has a new name, extremes by name, and (sum, weight of calls) by
        name.

        One transfer from the device.
        """
        # Two vectors: extremes with the flag, reduced by MAX, and the rest, by SUM. Ranks without a
        # value add what changes nothing: -inf, or 0.
        signs = {name: _SIGNS[reduce] for name, reduce in self._agreed.items() if reduce in _SIGNS}
        has_new = float(self._reduces.keys() > self._agreed.keys())
        highest = as_vector(
            has_new,
            *(s * self._values.get(name, -s * math.inf) for name, s in signs.items()),
        )
        added = (0.0 if name in signs else self._values.get(name, 0.0) for name in self._agreed)
        calls = (self._counts.get(name, 0.0) for name in self._agreed)
        totals = as_vector(*added, *calls)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        dist.all_reduce(totals)
        # Both in one copy: each copy from the device waits for it.
        values = torch.cat([highest, totals]).tolist()
        extremes = {
            name: s * value for (name, s), value in zip(signs.items(), values[1:], strict=False)
        }
        sums = values[len(highest) :]
        pairs = zip(sums, sums[len(self._agreed) :], strict=False)
        return bool(values[0]), extremes, dict(zip(self._agreed, pairs, strict=True))

    def _agree(self) -> None:
        """Bring all ranks to the same names in the same order. Collective."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._reduces)
        found: dict[str, Reduce] = {}
        for rank, names in enumerate(gathered):
            for name, reduce in names.items():
                if found.setdefault(name, reduce) != reduce:
                    raise ConfigError(
                        f"metric {name}: rank {rank} reduces it by {reduce}, a rank before it by "
                        f"{found[name]}: one way is needed on all ranks"
                    )
        self._agreed = dict(sorted(found.items()))
        self._reduces = dict(self._agreed)


def _combine(before: Any, value: Any, reduce: Reduce) -> Any:
    if reduce in ("sum", "mean"):
        return before + value
    if isinstance(before, Tensor) or isinstance(value, Tensor):
        pick = torch.maximum if reduce == "max" else torch.minimum
        return pick(torch.as_tensor(before), torch.as_tensor(value))
    if reduce == "max":
        return max(before, value)
    return min(before, value)


def as_vector(*entries: float | Tensor) -> Tensor:
    """Build a vector of the entries in fp64 on this rank's device."""
    # Numbers in one copy to the device; tensors are there, and must not be read on the host.
    numbers = [0.0 if isinstance(entry, Tensor) else entry for entry in entries]
    vector = torch.tensor(numbers, dtype=torch.float64).to(platform.device(), non_blocking=True)
    for i, entry in enumerate(entries):
        if isinstance(entry, Tensor):
            vector[i] = entry
    return vector
