"""Ranks watch each other over connections that only ranks can have."""

import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pytest

from megatron_vita.errors import EngineError
from megatron_vita.inference.engine import rank_monitor
from megatron_vita.inference.engine.rank_monitor import RankMonitor

Place = tuple[tuple[str, int], bytes]


@dataclass
class FakeGroup:
    """One rank of two, which are threads of this process."""

    own: int
    place: Future[Place]

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return 2


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> "queue.Queue[int]":
    """Lost ranks as they are reported, and the exit code of each process that would end; this one
    continues."""
    lost: queue.Queue[int] = queue.Queue()

    def broadcast(said: list[Place], *, group: FakeGroup, group_src: int) -> None:
        if group.own == group_src:
            group.place.set_result(said[0])
        said[0] = group.place.result(10)

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(rank_monitor.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(rank_monitor.os, "_exit", lost.put)
    monkeypatch.setattr(rank_monitor, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(rank_monitor, "HANDSHAKE_SECONDS", 0.3)
    return lost


def watches(
    first_guest: Callable[[tuple[str, int]], None],
    *,
    on_loss: Callable[[int], None] = lambda _: None,
) -> tuple[RankMonitor, RankMonitor]:
    """Monitors of rank 0 and of rank 1, which connects after `first_guest` has been at rank 0's
    address."""
    place: Future[Place] = Future()
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(RankMonitor, FakeGroup(0, place), on_loss=on_loss)  # type: ignore[arg-type]
        first_guest(place.result(10)[0])
        one = RankMonitor(FakeGroup(1, place), on_loss=on_loss)  # type: ignore[arg-type]
        return zero.result(10), one


def silent(_: socket.socket) -> None:
    """Keep the connection and send nothing."""


def slow(stranger: socket.socket) -> None:
    def drip() -> None:
        with suppress(OSError):
            for _ in range(20):
                time.sleep(0.1)
                stranger.sendall(b"x")

    threading.Thread(target=drip, daemon=True).start()


STRANGERS: dict[str, Callable[[socket.socket], None]] = {
    "hangs up": lambda stranger: stranger.close(),
    "says a rank": lambda stranger: stranger.sendall((1).to_bytes(4, "little")),
    "says much": lambda stranger: stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100),
    "silent": silent,
    "slow": slow,
}


@pytest.mark.parametrize("behave", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_stranger_that_connects_first_is_not_taken_for_a_rank(
    lost: "queue.Queue[int]", behave: Callable[[socket.socket], None]
) -> None:
    with socket.socket() as stranger:

        def come(address: tuple[str, int]) -> None:
            stranger.connect(address)
            behave(stranger)

        began = time.monotonic()
        zero, one = watches(come, on_loss=lost.put)
        assert time.monotonic() - began < 1.0
    assert list(zero._peers.values()) == [1]
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.1)
    for peer in one._peers:
        peer.shutdown(socket.SHUT_RDWR)  # as at the end of its process
    # two ranks, and two times exit code 1
    assert sorted(lost.get(timeout=2) for _ in range(4)) == [0, 1, 1, 1]


def test_a_process_whose_end_cannot_be_told_to_anyone_ends_all_the_same(
    lost: "queue.Queue[int]",
) -> None:
    def fail(rank: int) -> None:
        raise RuntimeError("nobody listens")

    zero, _ = watches(lambda _: None, on_loss=fail)
    for peer in zero._peers:
        peer.shutdown(socket.SHUT_RDWR)
    assert [lost.get(timeout=2), lost.get(timeout=2)] == [1, 1]


def test_a_rank_that_never_comes_is_named(
    monkeypatch: pytest.MonkeyPatch, lost: "queue.Queue[int]"
) -> None:
    monkeypatch.setattr(rank_monitor, "CONNECT_SECONDS", 0.3)
    with pytest.raises(EngineError, match=r"ranks \[1\] did not connect within 0\.3 seconds"):
        RankMonitor(FakeGroup(0, Future()), on_loss=lost.put)  # type: ignore[arg-type]


def test_a_rank_that_left_keeps_nothing_of_who_was_to_be_told(lost: "queue.Queue[int]") -> None:
    class Engine:
        def lose(self, rank: int) -> None:
            lost.put(rank)

    engine = Engine()
    both = watches(lambda _: None, on_loss=engine.lose)
    gone = weakref.ref(engine)
    del engine
    for each in both:
        each.close()
    assert gone() is None, "its weights would fill the memory that the next engine wants"


def test_ranks_that_leave_in_order_are_not_mourned(lost: "queue.Queue[int]") -> None:
    for each in watches(lambda _: None):
        each.close()
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.2)
