"""Notices that another rank is gone, also while this one waits for it inside a kernel that would
never end."""

import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_vita.errors import EngineError

logger = logging.getLogger(__name__)
GRACE_SECONDS = 10
"""Time for who is told to end in order, and for what waits for the lost rank to fail by itself, as it does on gloo."""
HEARING_SECONDS = 5.0
"""Time for who connects to say that it is a rank: a rank does so at once."""
JOINING_SECONDS = 60.0
"""Time for all ranks to connect."""
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""A host that lost its power or its network says nothing: it is asked after 10 silent seconds, 3 times."""
_GOODBYE = b"."
_SECRET_BYTES, _RANK_BYTES = 32, 4


class PeerWatch:
    """A connection of each other rank to the first. One that closes without a goodbye ends this
    process.

    Collective. The exit code is then 1, and the log says which rank is gone.
    """

    def __init__(self, group: ProcessGroup, *, on_loss: Callable[[int], None]) -> None:
        """`on_loss` is called with a rank that is gone, by the thread that watches. EngineError if
        one never comes."""
        self._on_loss = on_loss
        self._peers: dict[socket.socket, int] = {}
        rank, ranks = group.rank(), group.size()
        listener = socket.create_server(("", 0)) if rank == 0 else None
        address = (
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            listener.getsockname()[1] if listener else 0,
        )
        place = [(address, secrets.token_bytes(_SECRET_BYTES))]
        dist.broadcast_object_list(place, group=group, group_src=0)
        address, secret = place[0]
        if listener is None:
            peer = socket.create_connection(address, timeout=JOINING_SECONDS)
            peer.sendall(secret + rank.to_bytes(_RANK_BYTES, "little"))
            self._peers[peer] = 0
        else:
            with listener:
                self._let_all_in(listener, ranks - 1, secret)
        for peer in self._peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                peer.setsockopt(socket.IPPROTO_TCP, option, value)
        threading.Thread(target=self._watch, daemon=True, name="peer-watch").start()

    def _let_all_in(self, listener: socket.socket, ranks: int, secret: bytes) -> None:
        ends = time.monotonic() + JOINING_SECONDS
        while len(self._peers) < ranks:
            listener.settimeout(max(ends - time.monotonic(), 0.001))
            try:
                self._let_in(*listener.accept(), secret)
            except TimeoutError as error:
                missing = sorted(set(range(1, ranks + 1)) - set(self._peers.values()))
                raise EngineError(
                    f"ranks {missing} did not connect within {JOINING_SECONDS:g} seconds"
                ) from error

    def _let_in(self, peer: socket.socket, address: tuple[str, int], secret: bytes) -> None:
        """A connection that says the secret is a rank's; others are closed: anyone may connect to a
        port."""
        heard = _heard(peer, _SECRET_BYTES + _RANK_BYTES)
        if hmac.compare_digest(heard[:-_RANK_BYTES], secret):
            self._peers[peer] = int.from_bytes(heard[-_RANK_BYTES:], "little")
            return
        logger.warning("a connection from %s is no rank's: it is closed", address[0])
        peer.close()

    def close(self) -> None:
        """This rank leaves in order. What is lost from now on is told to nobody."""
        self._on_loss = lambda _: None
        for peer in self._peers:
            try:
                peer.sendall(_GOODBYE)
            except OSError:
                continue  # it left before

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, rank in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, data=(peer, rank))
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    peer, rank = key.data
                    if _said(peer) != _GOODBYE:
                        self._mourn(rank)

    def _mourn(self, rank: int) -> None:
        logger.error("rank %d is gone: the service ends", rank)
        try:
            self._on_loss(rank)
            time.sleep(GRACE_SECONDS)
        finally:
            os._exit(1)  # threads that wait inside a kernel cannot be ended in any other way


def _said(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""


def _heard(peer: socket.socket, count: int) -> bytes:
    """What a connection says first, `count` bytes; fewer where it closes or takes longer than
    HEARING_SECONDS."""
    ends, heard = time.monotonic() + HEARING_SECONDS, b""
    while len(heard) < count and (left := ends - time.monotonic()) > 0:
        try:
            peer.settimeout(left)
            more = peer.recv(count - len(heard))
        except OSError:
            break
        if not more:
            break
        heard += more
    return heard
