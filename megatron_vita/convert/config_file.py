"""Hugging Face's config.json: read with errors that name file and field."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vita.errors import CheckpointError

CONFIG = "config.json"


class Config:
    """A config, or a part of one, and where it comes from."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    @classmethod
    def read(cls, folder: Path) -> "Config":
        """The config of a folder; CheckpointError if there is none."""
        path = folder / CONFIG
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

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A field that must be there."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.where}: has no field {name}")
        return value

    def part(self, name: str) -> "Config":
        """A field that holds fields."""
        value = self.need(name)
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.where}: {name} is {value!r}: an object of fields is needed"
            )
        return Config(value, f"{self.where}: {name}")

    def must_be(self, name: str, known: Sequence[Any], default: Any) -> Any:
        """A field whose value must be one of `known`."""
        value = self.get(name, default)
        if value not in known:
            raise CheckpointError(
                f"{self.where}: {name} is {value!r}; supported: {', '.join(map(repr, known))}"
            )
        return value

    def side(self, name: str, default: int) -> int:
        """A number of pixels, given once or as [height, width] of a square."""
        value = self.get(name, default)
        sides = set(value) if isinstance(value, list) else {value}
        if len(sides) != 1:
            raise CheckpointError(f"{self.where}: {name} is {value}: only squares are supported")
        return sides.pop()


def updated(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`base` with `fields`; a field that is [side, side] in `base` stays a list."""
    return base | {
        n: [v, v] if isinstance(base.get(n), list) and isinstance(v, int) else v
        for n, v in fields.items()
    }
