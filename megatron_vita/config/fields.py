"""Recipe fields with documentation and bounds: `lr: float = described(1e-4, "Peak rate.", gt=0)`.

The choices of a field are those of its `Literal` type, or the names of a registry.
"""

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron_vita.errors import ConfigError

POWER_FROM = 1 << 20
"""Powers of two from this one on are shown as such in messages."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Range of a number; the names are pydantic's, and None is no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def allow(self, number: float) -> bool:
        """Return true if the number is in range; NaN never is."""
        # Every comparison with NaN is false, so each bound is tested for what is right.
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    def __str__(self) -> str:
        """The bounds in words that continue `must be`: at least 1."""
        if self.ge is not None and self.le is not None:
            return f"from {_shown(self.ge)} to {_shown(self.le)}"
        if self.gt == 0 and self.le is None:
            lower = "positive"
        else:
            lower = _phrase("above", self.gt) or _phrase("at least", self.ge)
        upper = _phrase("below", self.lt) or _phrase("at most", self.le)
        if self.lt == math.inf:
            upper = "finite"
        return " and ".join(filter(None, (lower, upper)))


def _phrase(words: str, bound: float | None) -> str:
    if bound is None:
        return ""
    return f"{words} {_shown(bound)}"


def _shown(bound: float) -> str:
    if isinstance(bound, int) and bound >= POWER_FROM and bound.bit_count() == 1:
        return f"2**{bound.bit_length() - 1}"
    if isinstance(bound, int):
        return str(bound)
    return f"{bound:g}"


def described(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | None = None,
) -> Any:
    """Define a dataclass field with a default, documentation for `--help` and bounds.

    `check_fields` enforces bounds and choices.

    Args:
        default: a list or dict is copied for each instance; a class is called for each instance.
        doc: one line, which a sentence with the bounds follows; a field without it is no option
            of a command line.
        ge, gt, le, lt: the number must be at least, above, at most, below this.
        choices: known values of a text field whose type is no `Literal`, read anew at each check.
    """
    metadata: dict[str, Any] = {"choices": choices}
    bounds = Bounds(ge=ge, gt=gt, le=le, lt=lt)
    if bounds != Bounds():
        metadata["bounds"] = bounds
        doc = doc and f"{doc} Must be {bounds}."
    if doc:
        metadata["doc"] = doc
    # A list or group shared by two recipes would let one change the other.
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_fields(group: Any, prefix: str = "") -> None:
    """Check the bounds and choices of a dataclass's fields; None is right for an optional field.

    Args:
        group: the instance.
        prefix: what precedes the name of a field in messages, as "training."; "--" for fields
            that are options of a command line.

    Raises:
        ConfigError: naming the field, its value and what would be right.
    """
    cls: type = type(group)
    hints = type_hints(cls)
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        hint = hints[field.name]
        if value is None and NoneType in get_args(hint):
            continue
        name = f"{prefix}{field.name}"
        if prefix == "--":
            name = name.replace("_", "-")
        if bounds := field.metadata.get("bounds"):
            is_right = isinstance(value, numbers.Real) and bounds.allow(value)
            # A number of a request may have thousands of digits.
            message = f"{name} is {value!r:.40}: it must be {bounds}"
            require(is_right, message)
        if known := choices_of(field, hint):
            is_list = isinstance(value, list) and get_origin(hint) is list
            values = value if is_list else [value]
            message = f"{name} is {value!r}; known: {', '.join(known)}"
            require(all(value in known for value in values), message)


@functools.cache
def type_hints(group: type) -> dict[str, Any]:
    """Resolve the types of a dataclass's fields; cached, since every request is checked by them."""
    return typing.get_type_hints(group)


def choices_of(field: dataclasses.Field[Any], hint: Any) -> tuple[str, ...]:
    """Known values of a field of type `hint`, or of the items of its list; empty if it is free."""
    if field.metadata.get("choices") is not None:
        return tuple(field.metadata["choices"])
    if get_origin(hint) is list:
        (hint,) = get_args(hint)
    if get_origin(hint) is Literal:
        return get_args(hint)
    return ()
