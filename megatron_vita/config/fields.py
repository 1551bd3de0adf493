"""Recipe fields with documentation: `lr: float = described(1e-4, "Peak learning rate.")`."""

import dataclasses
from typing import Any

from megatron_vita.errors import ConfigError


def described(default: Any = dataclasses.MISSING, doc: str = "") -> Any:
    """Define a dataclass field with a default and one line of documentation for `--help`.

    A list or dict is copied for each instance; a class as the default is called for each instance.
    """
    metadata = {"doc": doc}
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
