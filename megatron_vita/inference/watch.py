"""Notices that another rank is gone, also while this one waits for it inside a kernel that would never end."""

import logging
import os
import selectors
import socket
import threading
import time

import torch.distributed as dist
from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)
GRACE_SECONDS = 10
"""Time for what waits for the lost rank to fail with an error of its own, as it does on gloo."""
_GOODBYE = b"."


class PeerWatch:
    """A connection of each other rank to the first. One that closes without a goodbye ends this process.

    Collective. The exit code is then 1, and the log says which rank is gone.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._peers: dict[socket.socket, int] = {}
        rank, ranks = group.rank(), group.size()
        listener = socket.create_server(("", 0), backlog=ranks) if rank == 0 else None
        place = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), listener.getsockname()[1] if listener else 0)]
        dist.broadcast_object_list(place, group=group, group_src=0)
        if listener is None:
            peer = socket.create_connection(place[0], timeout=60)
            peer.sendall(rank.to_bytes(4, "little"))
            self._peers[peer] = 0
        else:
            for _ in range(ranks - 1):
                peer, _ = listener.accept()
                self._peers[peer] = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")
            listener.close()
        for peer in self._peers:
            peer.settimeout(None)
        threading.Thread(target=self._watch, daemon=True, name="peer-watch").start()

    def close(self) -> None:
        """This rank leaves in order."""
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
        time.sleep(GRACE_SECONDS)
        os._exit(1)  # threads that wait inside a kernel cannot be ended in any other way


def _said(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""
