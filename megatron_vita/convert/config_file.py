"""Hugging Face's config files: read with errors that name file and field, and with a record of the
fields that were read."""

import json
from collections.abc import Collection, Iterator, Sequence
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
    """A config, or a part of one, and where it comes from."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self._read: set[str] = set()
        self._parts: dict[str, Config] = {}

    @classmethod
    def read(cls, folder: Path, name: str = CONFIG) -> "Config":
        """The config of a folder; CheckpointError if there is none."""
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
        """The config of a folder; one without fields where the folder has no file of this name."""
        path = folder / name
        if path.exists():
            return cls.read(folder, name)
        return cls({}, str(path))

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it is missing or null."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        return value

    def need(self, name: str) -> Any:
        """A field that must be there."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.where}: has no field {name}")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`, which must be there unless it has a default."""
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"a whole number of at least {least} is needed")
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A number of at least `least`, which must be there unless it has a default."""
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise self.wrong(name, f"a number of at least {least:g} is needed")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false is needed")
        return value

    def named(self, model_type: str) -> "Config":
        """The same fields, of another model type; what is read of it counts as read here."""
        view = Config(self.values | {"model_type": model_type}, self.where)
        view._read = self._read
        view._parts = self._parts
        return view

    def part(self, name: str) -> "Config":
        """A field that holds fields."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object of fields is needed")
        if name not in self._parts:
            self._parts[name] = Config(value, f"{self.where}: {name}")
        return self._parts[name]

    def must_be(self, name: str, known: Sequence[Any], default: Any) -> Any:
        """A field whose value must be one of `known`."""
        value = self.get(name, default)
        if value not in known:
            supported = ", ".join(map(repr, known))
            raise CheckpointError(f"{self.where}: {name} is {value!r}; supported: {supported}")
        return value

    def refuse(self, names: Sequence[str], right: str) -> None:
        """CheckpointError where a field is given that no model here can follow."""
        for name in names:
            if self.get(name) is not None:
                raise CheckpointError(f"{self.where}: {name} is given; {right}")

    def side(self, name: str, default: int) -> int:
        """A number of pixels, given once, as [height, width] or by name, of a square."""
        value = self.get(name, default)
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
        """The error that a field's value is, with what would be right."""
        return CheckpointError(f"{self.where}: {name} is {self.values.get(name)!r}: {right}")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Names this file in errors of recipes that are made from it."""
        try:
            yield
        except ConfigError as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def disregard(self, names: Collection[str]) -> None:
        """Counts fields as read that are known to change nothing."""
        self._read.update(names)

    def unread(self) -> Iterator[tuple[str, str, Any]]:
        """Fields that say something and that nobody has read, parts included: place, name, value.

        Null and empty fields say nothing. Names that begin with an underscore are notes of the program that wrote the file.
        """
        for name, value in self.values.items():
            if name in self._parts:
                yield from self._parts[name].unread()
            elif name not in self._read and value not in (None, {}, []) and name[0] != "_":
                yield self.where, name, value

    def refuse_unread(self, ignored: Collection[str] = ()) -> None:
        """CheckpointError, naming the first, for fields that nobody has read and that are not
        `ignored`."""
        for where, name, value in self.unread():
            if name not in ignored:
                raise CheckpointError(
                    f"{where}: {name} is {value!r:.60}; it is not known here whether that changes "
                    f"what the model computes: if it does not, give --ignore-field {name}"
                )


def updated(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`base` with `fields`; a field that is [side, side] in `base` stays a list."""
    return base | {
        n: [v, v] if isinstance(base.get(n), list) and isinstance(v, int) else v
        for n, v in fields.items()
    }
