"""How a recipe field carries its own documentation: `lr: float = described(1e-4, "Peak learning
rate.")`."""

import dataclasses
from typing import Any

from megatron_vita.errors import ConfigError


def described(default: Any = dataclasses.MISSING, doc: str = "") -> Any:
    """A dataclass field with a default (a list or dataclass is copied for each owner) and one line
    of documentation."""
    metadata = {"doc": doc}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
