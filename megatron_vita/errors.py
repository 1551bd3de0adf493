"""Exceptions for errors that a user can cause.

Every message names the file, sample or field, the value, and what would be right.
"""

from collections.abc import Sequence


class VitaError(Exception):
    """Base class of all errors that a user can cause and fix."""


class ConfigError(VitaError, ValueError):
    """A recipe, an override or an argument is invalid."""


class DataError(VitaError, ValueError):
    """A sample, a shard, an index or a plan is damaged or does not match."""


class ShardError(DataError):
    """A shard or its index is missing, or is not the planned one; concerns all of its samples."""


class LogitsError(VitaError, ValueError):
    """Logits are NaN or infinite, in the given `rows` of the batch."""

    def __init__(self, message: str, *, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class CheckpointError(VitaError, ValueError):
    """A checkpoint is missing, incomplete, or of another model."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, cut or altered; an older one may be whole."""


class SaveError(CheckpointError):
    """A checkpoint cannot be written, for a reason that may pass, such as a full disk."""


class ClaimedError(CheckpointError):
    """A later job has taken over the folder that a job saves to."""


class StoppedError(VitaError):
    """A run was stopped by a signal before its last step."""


class CallbackError(VitaError, RuntimeError):
    """A callback of a run failed, on this rank or another."""


class PlatformError(VitaError, RuntimeError):
    """The host or its packages cannot run what was requested."""


class EngineError(VitaError, RuntimeError):
    """The inference engine cannot continue."""


class ServerError(VitaError, RuntimeError):
    """A server cannot be reached, refuses a key, or fails."""


class RefusedError(ServerError):
    """The server rejected the request itself (HTTP 400, 413 or 422)."""
