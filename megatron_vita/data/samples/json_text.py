"""Strict JSON parsing: invalid text and duplicate keys are errors."""

import json
from typing import Any

from megatron_vita.errors import DataError


def parse_json(data: bytes | str) -> Any:
    """Parse a JSON text.

    Raises:
        DataError: it is not JSON, or repeats a key in an object, whose first value would be lost.
    """
    try:
        return json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        # Raised by `_object`; DataError is a ValueError, too.
        if isinstance(error, DataError):
            raise
        raise DataError(f"not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice} occurs twice in an object")
    return found
