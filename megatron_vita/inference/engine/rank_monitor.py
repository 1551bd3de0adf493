"""Detection of a lost rank, even while this one waits for it inside a kernel that would never end."""

import contextlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_vita.errors import EngineError, VitaError

logger = logging.getLogger(__name__)
GRACE_SECONDS = 10
"""Time for callbacks to shut down cleanly, and for collectives to fail by themselves, as they do on gloo."""
HANDSHAKE_SECONDS = 5.0
"""Time in which a new connection must identify itself as a rank: ranks do so at once."""
CONNECT_SECONDS = 60.0
"""Time for all ranks to connect."""
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""TCP keep-alive finds hosts that lost power or network, which close no connection."""
_GOODBYE = b"."
_SECRET_BYTES = 32
_RANK_BYTES = 4


class RankMonitor:
    """Holds a connection of each other rank to the first; one that closes without a goodbye ends
    this process with exit code 1, and the log names the lost rank. Collective.
    """

    def __init__(self, group: ProcessGroup, *, on_loss: Callable[[int], None]) -> None:
        """`on_loss` is called with the lost rank, by the monitoring thread.

        Raises:
            EngineError: a rank did not connect in time.
        """
        self._on_loss = on_loss
        self._peers: dict[socket.socket, int] = {}
        rank = group.rank()
        ranks = group.size()
        listener = socket.create_server(("", 0)) if rank == 0 else None
        address = (
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            listener.getsockname()[1] if listener else 0,
        )
        # The secret travels through the process group, which only ranks belong to.
        place = [(address, secrets.token_bytes(_SECRET_BYTES))]
        dist.broadcast_object_list(place, group=group, group_src=0)
        address, secret = place[0]
        if listener is None:
            peer = socket.create_connection(address, timeout=CONNECT_SECONDS)
            peer.sendall(secret + rank.to_bytes(_RANK_BYTES, "little"))
            self._peers[peer] = 0
        else:
            with listener:
                self._accept_ranks(listener, ranks - 1, secret)
        for peer in self._peers:
            # Timeouts were for the handshake only.
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                peer.setsockopt(socket.IPPROTO_TCP, option, value)
        threading.Thread(target=self._monitor, daemon=True, name="rank-monitor").start()

    def _accept_ranks(self, listener: socket.socket, ranks: int, secret: bytes) -> None:
        ends = time.monotonic() + CONNECT_SECONDS
        while len(self._peers) < ranks:
            listener.settimeout(max(ends - time.monotonic(), 0.001))
            try:
                self._accept(*listener.accept(), secret)
            except TimeoutError as error:
                missing = sorted(set(range(1, ranks + 1)) - set(self._peers.values()))
                raise EngineError(
                    f"ranks {missing} did not connect within {CONNECT_SECONDS:g} seconds"
                ) from error

    def _accept(self, peer: socket.socket, address: tuple[str, int], secret: bytes) -> None:
        """Keep a connection that knows the secret, and close any other: anyone may connect to a
        port."""
        received = _receive(peer, _SECRET_BYTES + _RANK_BYTES)
        if hmac.compare_digest(received[:-_RANK_BYTES], secret):
            self._peers[peer] = int.from_bytes(received[-_RANK_BYTES:], "little")
            return
        logger.warning("closed a connection from %s, which is not a rank", address[0])
        peer.close()

    def close(self) -> None:
        """Say goodbye to the other ranks; losses from now on are not reported."""
        # Connections of ranks that leave in order close too, which is no loss any more.
        self._on_loss = lambda _: None
        for peer in self._peers:
            try:
                peer.sendall(_GOODBYE)
            except OSError:
                continue  # it left before

    def _monitor(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, rank in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, data=(peer, rank))
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    peer, rank = key.data
                    if _receive_byte(peer) != _GOODBYE:
                        self._abort(rank)

    def _abort(self, rank: int) -> None:
        logger.error("rank %d is gone: the service ends", rank)
        try:
            # The callback may answer open requests with an error before the process ends.
            self._on_loss(rank)
            time.sleep(GRACE_SECONDS)
        finally:
            os._exit(1)  # threads that wait inside a kernel cannot be ended in any other way


@contextlib.contextmanager
def lost_rank_as_engine_error() -> Iterator[None]:
    """Turn the errors that a lost rank causes into one EngineError."""
    try:
        yield
    # Errors of ours say what is wrong; only those of collectives are translated.
    except VitaError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise EngineError(
            f"the engine cannot go on: a rank is gone or failed: {reason[0]}"
        ) from error


def _receive_byte(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""


def _receive(peer: socket.socket, count: int) -> bytes:
    """Receive `count` bytes; fewer if the peer closes or takes longer than HANDSHAKE_SECONDS."""
    ends = time.monotonic() + HANDSHAKE_SECONDS
    received = b""
    while len(received) < count and (left := ends - time.monotonic()) > 0:
        try:
            peer.settimeout(left)
            more = peer.recv(count - len(received))
        except OSError:
            break
        if not more:
            break
        received += more
    return received
