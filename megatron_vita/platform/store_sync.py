"""Barrier and broadcast through the process group's store, without a time limit.

A collective fails after the limit of its group; an upload or a save to a busy file system may take
longer.
"""

import datetime
import itertools
import json
import os
import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita.errors import PlatformError

LONGEST = datetime.timedelta(days=365)
CONNECT = datetime.timedelta(minutes=10)


@dataclass
class _Keys:
    """Names of keys of one process group: a store may outlive the ranks that it serves."""

    token: str = ""
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def next(self) -> str:
        """Return a key that is new, and the same on all ranks."""
        return f"store_sync/{self.token}/{next(self.numbers)}"


_keys = _Keys()


def agree_on_keys() -> None:
    """Agree on the names of keys, once the process group is there. Collective."""
    tokens = [secrets.token_hex(8)]
    dist.broadcast_object_list(tokens, src=0)
    _keys.token = tokens[0]
    _keys.numbers = itertools.count()


def broadcast_from_first(value: Any) -> Any:
    """Return the first rank's value of JSON on all ranks, however long it takes to come.
    Collective."""
    store = _store()
    key = _keys.next()
    if dist.get_rank() == 0:
        store.set(key, json.dumps(value))
        return value
    store.wait([key], LONGEST)
    return json.loads(store.get(key))


def store_barrier() -> None:
    """Wait until all ranks are here, however long it takes. Collective."""
    store = _store()
    key = _keys.next()
    if store.add(f"{key}/count", 1) == dist.get_world_size():
        store.set(f"{key}/all", "")
    store.wait([f"{key}/all"], LONGEST)


def set_key(key: str) -> None:
    """Set a key for processes outside of the group that wait for it."""
    store = _connect()
    store.set(key, "")
    # Answered only after the key is there: the store may end with this process.
    store.wait([key], CONNECT)


def wait_for_key(key: str) -> None:
    """Wait for a key in a process that is not in the group.

    Raises:
        PlatformError: the group's store is gone.
    """
    try:
        _connect().wait([key], LONGEST)
    except RuntimeError as error:
        raise PlatformError(f"the ranks that train are gone: {error}") from error


def _connect() -> dist.Store:
    """Return the launcher's store, without the prefixes of a process group."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=CONNECT,
        wait_for_workers=False,
    )


def _store() -> dist.Store:
    store: dist.Store = torch.distributed.distributed_c10d._get_default_store()
    return store
