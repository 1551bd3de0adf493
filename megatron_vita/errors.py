"""What a user can cause, as exceptions.

Every message names the file, sample or field, the value, and what would be right.
"""

from collections.abc import Sequence


class VitaError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(VitaError, ValueError):
    """A recipe, an override or an argument is wrong."""


class DataError(VitaError, ValueError):
    """A sample, a shard, an index or a plan is damaged or does not fit."""


class ShardError(DataError):
    """A shard or its index is missing, or is another than the one planned."""


class LogitsError(VitaError, ValueError):
    """A model's logits are NaN or infinite; `rows` of the batch have such ones."""

    def __init__(self, message: str, *, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class CheckpointError(VitaError, ValueError):
    """A checkpoint is missing, incomplete or of another model."""


class StoppedError(VitaError):
    """A run was told to stop before its last step."""


class CallbackError(VitaError, RuntimeError):
    """A callback of a run failed, on this rank or another."""


class PlatformError(VitaError, RuntimeError):
    """The machine or its packages cannot run what was asked."""


class EngineError(VitaError, RuntimeError):
    """The inference engine cannot go on."""


class ServerError(VitaError, RuntimeError):
    """A server cannot be reached, refuses a key, or fails."""


class RefusedError(ServerError):
    """A server takes no answer upon itself because of what is in the question."""
