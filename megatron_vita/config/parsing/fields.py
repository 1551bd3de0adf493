"""Recipe fields with documentation and rules: `lr: float = described(1e-4, "Peak rate.", gt=0)`.

The choices of a field are those of its `Literal` type, or the names of a registry.
"""

import dataclasses
import functools
import math
import numbers
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron_vita.errors import ConfigError
from megatron_vita.sizes import counted

NEED = re.compile(r"(\w+)(?:(=|>)(.+))?")
"""A needed field: its name, and the value that it must have or exceed."""
POWER_FROM = 1 << 20
"""Powers of two from this one on are shown as such in messages."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Range of a number; the names are pydantic's, and None is no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None

    def allow(self, number: float) -> bool:
        """Return true if the number is in range; NaN never is."""
        # Every comparison with NaN is false, so each bound is tested for what is right.
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
            and (self.multiple_of is None or number % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        """The bounds in words that continue `must be`: at least 1."""
        lower = _phrase("above", self.gt) or _phrase("at least", self.ge)
        upper = _phrase("below", self.lt) or _phrase("at most", self.le)
        if self.gt == 0 and self.le is None:
            lower = "positive"
        if self.lt == math.inf:
            upper = "finite"
        if self.ge is not None and self.le is not None:
            lower = f"from {_shown(self.ge)} to {_shown(self.le)}"
            upper = ""
        factor = _phrase("a multiple of", self.multiple_of)
        return " and ".join(filter(None, (lower, upper, factor)))


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


@dataclass(frozen=True, kw_only=True)
class Form:
    """Form of a text, or of each text of a list."""

    pattern: str
    name: str

    def allows(self, value: Any) -> bool:
        """Return true for a text that the pattern matches as a whole."""
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None


def described(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    multiple_of: int | None = None,
    choices: Iterable[str] | None = None,
    form: Form | None = None,
    min_length: int = 0,
    needs: tuple[str, ...] = (),
) -> Any:
    """Define a dataclass field with a default, documentation for `--help` and what it may hold.

    `check_fields` enforces bounds, choices, forms, lengths and needs, and `--help` shows them.

    Args:
        default: a list or dict is copied for each instance; a class is called for each instance.
        doc: one line, which sentences with the bounds follow; a field without it is no option
            of a command line.
        ge, gt, le, lt: the number must be at least, above, at most, below this.
        multiple_of: the number must be a multiple of this.
        choices: known values of a text field whose type is no `Literal`, read anew at each check.
        form: pattern of a text, or of each text of a list.
        min_length: fewest items of a list.
        needs: fields of the same group that must be set, have a value ("kind=linear") or exceed one
            ("size>1"), where this one differs from its default.
    """
    metadata: dict[str, Any] = {
        "choices": choices,
        "form": form,
        "min_length": min_length,
        "needs": needs,
    }
    rules = []
    bounds = Bounds(ge=ge, gt=gt, le=le, lt=lt, multiple_of=multiple_of)
    if bounds != Bounds():
        metadata["bounds"] = bounds
        rules.append(f"Must be {bounds}.")
    if form:
        rules.append(f"Form: {form.name}.")
    if min_length:
        rules.append(f"Items: {_phrase('at least', min_length)}.")
    if needs:
        words = " and ".join(needs).replace("=", " ").replace(">", " above ")
        rules.append(f"Needs {words}.")
    if doc:
        metadata["doc"] = " ".join((doc, *rules))
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


def option_flag(field: str) -> str:
    """Name of a field as an option of a command line: --time-limit."""
    return f"--{field.replace('_', '-')}"


def check_fields(group: Any, prefix: str = "", *, as_options: bool = False) -> None:
    """Check what the fields of a dataclass declare; None is right for an optional field.

    Args:
        group: the instance.
        prefix: what precedes the name of a field in messages, as "training.".
        as_options: name fields as options of a command line.

    Raises:
        ConfigError: naming the field, its value and what would be right.
    """
    cls: type = type(group)
    hints = type_hints(cls)
    fields = dataclasses.fields(group)
    for field in fields:
        value = getattr(group, field.name)
        hint = hints[field.name]
        if value is None and NoneType in get_args(hint):
            continue
        name = f"{prefix}{field.name}"
        if as_options:
            name = option_flag(field.name)
        _check_value(field, hint, value, name)
    # Only now: a wrong value of a field would be reported as one that another field needs.
    for field in fields:
        for needed in field.metadata.get("needs", ()):
            _check_needed(group, field, needed, prefix)


def _check_value(field: dataclasses.Field[Any], hint: Any, value: Any, name: str) -> None:
    if bounds := field.metadata.get("bounds"):
        is_right = isinstance(value, numbers.Real) and bounds.allow(value)
        # A number of a request may have thousands of digits.
        require(is_right, f"{name} is {value!r:.40}: it must be {bounds}")
    if fewest := field.metadata.get("min_length"):
        has_enough = isinstance(value, list) and len(value) >= fewest
        require(has_enough, f"{name} is {value!r}: it must have at least {counted(fewest, 'item')}")
    is_list = isinstance(value, list) and get_origin(hint) is list
    values = value if is_list else [value]
    if known := choices_of(field, hint):
        message = f"{name} is {value!r}; known: {', '.join(known)}"
        require(all(value in known for value in values), message)
    if form := field.metadata.get("form"):
        for item in values:
            verb = "holds" if is_list else "is"
            require(form.allows(item), f"{name} {verb} {item!r}: {form.name} is needed")


def _check_needed(group: Any, field: dataclasses.Field[Any], needed: str, prefix: str) -> None:
    """Refuse a field without effect: whoever sets it expects one."""
    value = getattr(group, field.name)
    if value == _default_of(field):
        return
    name, relation, wanted = _parsed(needed)
    actual = getattr(group, name)
    cls: type = type(group)
    shown = value
    if type_hints(cls)[field.name] is str:
        shown = repr(value)
    message = f"{prefix}{field.name} is {shown}, which needs {prefix}{name}"
    if relation == "=":
        require(actual == wanted, f"{message} {wanted}; it is {actual}")
    elif relation == ">":
        require(actual > int(wanted), f"{message} above {wanted}; it is {actual}")
    else:
        require(bool(actual), message)


def _parsed(needed: str) -> tuple[str, str, str]:
    """Split a need into name, relation and value; the last two are empty for a field to be set."""
    found = NEED.fullmatch(needed)
    assert found, needed
    name, relation, wanted = found.groups(default="")
    return name, relation, wanted


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


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
