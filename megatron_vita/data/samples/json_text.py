"""JSON as users write it: what is none, and keys that stand twice, are errors."""

import json
from typing import Any

from megatron_vita.errors import DataError


def parse_json(data: bytes | str) -> Any:
    """The value that a JSON text says.

    Raises:
        DataError: it is not JSON, or a key stands twice in an object, of which the first value
            would be lost.
    """
    try:
        return json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice} stands twice in an object")
    return found
