"""Reader of Hugging Face's JSON config files.

Errors name the file and the field. Each Config records the fields that were read, so that a field
that nobody has read can be refused.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError, ConfigError

CONFIG = "config.json"
QUANTIZED = ("quantization_config", "compression_config")
UNQUANTIZED = (
    "quantized weights are read from GGUF files alone; take the folder of the unquantized model"
)


class Config:
    """Fields of a config file, or of an object inside it, with the place they come from for errors."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        # Kept with their Config: reading a field of a nested object twice must count on the same
        # object.
        self._read: set[str] = set()
        self._parts: dict[str, Config] = {}

    @classmethod
    def read(cls, folder: Path, name: str = CONFIG) -> "Config":
        """Read a config file of a folder.

        Raises:
            CheckpointError: the file is missing or no JSON object.
        """
        path = folder / name
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as a Hugging Face config: {error}"
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{path}: holds {type(values).__name__}: an object of fields is needed"
            )
        return cls(values, str(path))

    @classmethod
    def read_if_present(cls, folder: Path, name: str) -> "Config":
        """Read a config file of a folder; a missing file gives a Config without fields."""
        path = folder / name
        if path.exists():
            return cls.read(folder, name)
        return cls({}, str(path))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` where it is missing or null."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        return value

    def need(self, name: str) -> Any:
        """Return a field; CheckpointError if it is missing or null."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.where}: has no field {name}")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Return an integer field of at least `least`; a field without a default is required."""
        value = self._required_or(name, default)
        # bool is a subclass of int in Python, and `true` is no number here.
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"a whole number of at least {least} is needed")
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0) -> float:
        """Return a numeric field of at least `least`; a field without a default is required."""
        value = self._required_or(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise self.wrong(name, f"a number of at least {least:g} is needed")
        return float(value)

    def _required_or(self, name: str, default: Any) -> Any:
        if default is None:
            return self.need(name)
        return self.get(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean field."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false is needed")
        return value

    def named(self, model_type: str) -> "Config":
        """Return a view of this config with another `model_type`; fields read through it count as
        read here."""
        return self._view(self.values | {"model_type": model_type})

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Config":
        """Return a view of this config that has `defaults` for missing fields; fields read through
        it count as read here."""
        return self._view({**defaults, **self.values})

    def _view(self, values: dict[str, Any]) -> "Config":
        view = Config(values, self.where)
        # Shared on purpose: the caller refuses the unread fields of the original object.
        view._read = self._read
        view._parts = self._parts
        return view

    def part(self, name: str) -> "Config":
        """Return a nested object as a Config of its own."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object of fields is needed")
        if name not in self._parts:
            self._parts[name] = Config(value, f"{self.where}: {name}")
        return self._parts[name]

    def must_be(self, name: str, known: Sequence[Any], default: Any) -> Any:
        """Return a field; CheckpointError if its value is not one of `known`."""
        value = self.get(name, default)
        if value not in known:
            supported = ", ".join(map(repr, known))
            raise CheckpointError(f"{self.where}: {name} is {value!r}; supported: {supported}")
        return value

    def refuse(self, names: Sequence[str], right: str) -> None:
        """Raise CheckpointError if one of the fields is set: no model here implements it. `right`
        says what to do."""
        for name in names:
            if self.get(name) is not None:
                raise CheckpointError(f"{self.where}: {name} is given; {right}")

    def side(self, name: str, default: int) -> int:
        """Return the side of a square in pixels, given as a number, [height, width] or an object of
        sides."""
        value = self.get(name, default)
        # Processors write sizes as {"height", "width"} or {"shortest_edge"}, configs as numbers or
        # pairs.
        if isinstance(value, dict) and value.keys() <= {"height", "width", "shortest_edge"}:
            value = list(value.values())
        sides = set(value) if isinstance(value, list) else {value}
        if len(sides) != 1:
            raise self.wrong(name, "only squares are supported")
        side = sides.pop()
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise self.wrong(name, "a whole number of pixels is needed")
        return side

    def wrong(self, name: str, right: str) -> CheckpointError:
        """Build the error for a field's value; `right` says what would be right."""
        return CheckpointError(f"{self.where}: {name} is {self.values.get(name)!r}: {right}")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Prefix errors of recipe groups built inside with the name of this file."""
        try:
            yield
        # Recipe groups check themselves and know only their own field names; users know the file.
        except ConfigError as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def disregard(self, names: Collection[str]) -> None:
        """Mark fields as read that are known to have no effect."""
        self._read.update(names)

    def unread(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (file, name, value) of the fields that were never read, nested objects included.

        Null and empty fields are left out, and so are names that begin with an underscore: the
        program that wrote the file keeps notes in them.
        """
        for name, value in self.values.items():
            # A nested object that was opened as a part is checked field by field, otherwise as a
            # whole.
            if name in self._parts:
                yield from self._parts[name].unread()
            elif name not in self._read and value not in (None, {}, []) and name[0] != "_":
                yield self.where, name, value

    def refuse_unread(self, ignored: Collection[str] = ()) -> None:
        """Raise CheckpointError for the first field that was never read and is not `ignored`."""
        for where, name, value in self.unread():
            if name not in ignored:
                raise CheckpointError(
                    f"{where}: {name} is {value!r:.60}; it is not known here whether that changes "
                    f"what the model computes: if it does not, give --ignore-field {name}"
                )


def updated(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `fields`; a field given as [side, side] in `base` stays a list."""
    return base | {
        # transformers writes InternViT's image and patch sizes as pairs
        n: [v, v] if isinstance(base.get(n), list) and isinstance(v, int) else v
        for n, v in fields.items()
    }
