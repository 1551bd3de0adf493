"""Waits of all ranks for one another through the job's store, which have no limit of time.

A collective fails after the limit of its group; an upload or a save to a busy file system may take
longer.
"""

import datetime
import itertools
import json
import os
import secrets
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_vita.errors import PlatformError

LONGEST = datetime.timedelta(days=365)
CONNECT = datetime.timedelta(minutes=10)


@dataclass
class _Session:
    """Names of the keys of one process group: a store may outlive the ranks that it serves."""

    token: str = ""
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def next_key(self) -> str:
        """Return a key that is new, and the same on all ranks."""
        return f"meeting/{self.token}/{next(self.numbers)}"


_session = _Session()


def open_session() -> None:
    """Agree on the names of keys, once the process group is there. Collective."""
    tokens = [secrets.token_hex(8)]
    dist.broadcast_object_list(tokens, src=0)
    _session.token = tokens[0]
    _session.numbers = itertools.count()


def share_from_first(text: str) -> str:
    """Return the first rank's `text` on all ranks, however long it takes to come. Collective."""
    store = _store()
    key = _session.next_key()
    if dist.get_rank() == 0:
        store.set(key, json.dumps(text))
        return text
    store.wait([key], LONGEST)
    shared: str = json.loads(store.get(key))
    return shared


def wait_for_all() -> None:
    """Wait until all ranks are here, however long it takes. Collective."""
    store = _store()
    key = _session.next_key()
    if store.add(f"{key}/count", 1) == dist.get_world_size():
        store.set(f"{key}/all", "")
    store.wait([f"{key}/all"], LONGEST)


def announce(word: str) -> None:
    """Let processes outside of the group go on that wait for `word`; from the first rank."""
    if dist.get_rank() == 0:
        _connect().set(word, "")


def wait_outside(word: str) -> None:
    """Wait for `word` in a process that is not in the group.

    Raises:
        PlatformError: the group's store is gone.
    """
    try:
        _connect().wait([word], LONGEST)
    except (RuntimeError, dist.DistError) as error:
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
