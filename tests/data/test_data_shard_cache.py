"""The cache of remote shards: failures of store and disk, and several processes that evict, write
and die."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from upath import UPath

from megatron_vita import stores
from megatron_vita.data.samples.rows import Member
from megatron_vita.data.shards import cache as shard_cache
from megatron_vita.data.shards import reader as shard_reader
from megatron_vita.data.shards.cache import ShardCache
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.errors import ConfigError, DataError, ShardError

SIZE = 1000
MEMBER = Member("a.png", 10, 20)
FIRST = UPath("memory://cached/first.tar")
SECOND = UPath("memory://cached/second.tar")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0)
    FIRST.write_bytes(b"1" * SIZE)
    SECOND.write_bytes(b"2" * SIZE)


def read(folder: Path, shard: UPath, *, limit: int = 10 * SIZE) -> bytes:
    reader = ShardReader(cache=ShardCache(folder, limit=limit))
    return reader.read(shard, member=MEMBER, shard_size=SIZE)


def sizes(folder: Path, suffix: str) -> list[int]:
    return [path.stat().st_size for path in folder.glob(f"*{suffix}")]


@pytest.mark.parametrize("method", ["cat_file", "info"])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ConnectionError("the store is down"),
            r"first.tar: cannot copy the shard: .*the store is down \(5 attempts\)",
        ),
        (
            PermissionError("no such key for you"),
            r"first.tar: cannot copy the shard: no such key for you",
        ),
        (FileNotFoundError("gone"), r"first.tar: cannot open the shard: it is not there"),
    ],
)
def test_a_failure_of_the_store_is_one_of_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, failure: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.filesystem("memory"), method, fail)
        with pytest.raises(ShardError, match=message):
            read(tmp_path, FIRST)
    assert not sizes(tmp_path, ".partial")
    assert read(tmp_path, FIRST) == b"1" * 20


def test_a_copy_evicted_as_soon_as_it_is_found_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(tmp_path, FIRST)
    mark_used = os.utime
    evicted = []

    def evict_then(file: int | Path, *rest: Any) -> None:
        mark_used(file, *rest)
        for copy in tmp_path.glob("*.tar"):
            evicted.append(copy)
            copy.unlink()

    monkeypatch.setattr(os, "utime", evict_then)
    assert read(tmp_path, FIRST) == b"1" * 20
    assert evicted


def test_a_copy_evicted_as_soon_as_it_is_made_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    other = threading.Thread(target=read, args=(tmp_path, SECOND), kwargs={"limit": SIZE})

    def rename_then_evict(path: Path, target: Path) -> None:
        rename(path, target)
        if FIRST.name in target.name:
            other.start()
            other.join(0.3)

    monkeypatch.setattr(Path, "rename", rename_then_evict)
    assert read(tmp_path, FIRST, limit=SIZE) == b"1" * 20
    other.join(20)
    assert [path.name.split("-")[1] for path in tmp_path.glob("*.tar")] == [SECOND.name]


def test_readers_that_evict_each_others_copies_read_on(tmp_path: Path) -> None:
    def alternate(start: int) -> list[bytes]:
        return [read(tmp_path, (FIRST, SECOND)[(start + i) % 2], limit=SIZE)[:1] for i in range(40)]

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(alternate, (0, 1))
    assert first == [b"1", b"2"] * 20
    assert second == [b"2", b"1"] * 20


def test_a_file_of_a_shard_that_is_gone_is_not_opened(tmp_path: Path) -> None:
    """Decoders take whatever goes wrong while they read for damage."""
    gone = UPath("memory://cached/gone.tar")
    for shard, cache in (
        (gone, ShardCache(tmp_path, limit=SIZE)),
        (gone, None),
        (tmp_path / "gone.tar", None),
    ):
        with pytest.raises(ShardError, match=r"gone.tar: cannot open the shard"):
            ShardReader(cache=cache).open(shard, member=MEMBER, shard_size=SIZE).__enter__()


@pytest.mark.parametrize("decoder", ["passes over it", "wraps it"])
def test_a_read_that_failed_is_told_whatever_a_decoder_makes_of_it(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a film would show other frames where the store failed for a moment."""

    def fail(*_: object) -> bytes:
        raise OSError("the store is down")

    def decode() -> None:
        with ShardReader().open(FIRST, member=MEMBER, shard_size=SIZE) as file:
            try:
                file.read(1)
            except DataError:
                if decoder == "wraps it":
                    raise DataError("the film is damaged") from None

    monkeypatch.setattr(shard_reader, "read_range", fail)
    with pytest.raises(DataError, match=r"cannot read .*: the store is down"):
        decode()


def test_an_evicted_copy_gives_its_disk_back_when_the_next_one_is_opened(tmp_path: Path) -> None:
    reader = ShardReader(cache=ShardCache(tmp_path, limit=SIZE))
    for shard in (FIRST, SECOND, FIRST, SECOND):
        reader.read(shard, member=MEMBER, shard_size=SIZE)
        held = [
            os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()
        ]
        assert sum(str(tmp_path) in target for target in held) == 1, held


@pytest.fixture
def slow_first(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Has a copy of FIRST begin, as the first event tells, and end when the second one is set."""
    begun = threading.Event()
    may_end = threading.Event()
    read_range = shard_cache.read_range

    def wait_then_read(location: UPath, start: int, stop: int) -> bytes:
        if location == FIRST:
            begun.set()
            assert may_end.wait(20)
        return read_range(location, start, stop)

    monkeypatch.setattr(shard_cache, "read_range", wait_then_read)
    monkeypatch.setattr(shard_cache, "PAUSE", 0.01)
    yield begun, may_end
    may_end.set()


def test_a_copy_waits_while_those_being_written_leave_no_room(
    tmp_path: Path, slow_first: tuple[threading.Event, threading.Event]
) -> None:
    begun, may_end = slow_first
    limit = SIZE * 3 // 2
    with ThreadPoolExecutor(2) as threads:
        first: Future[bytes] = threads.submit(read, tmp_path, FIRST, limit=limit)
        assert begun.wait(20)
        second = threads.submit(read, tmp_path, SECOND, limit=limit)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        assert sizes(tmp_path, ".partial") == [SIZE]
        may_end.set()
        assert (first.result(), second.result()) == (b"1" * 20, b"2" * 20)
    assert sizes(tmp_path, ".tar") == [SIZE]


def test_a_copy_being_written_counts_in_full_and_is_not_evicted(
    tmp_path: Path, slow_first: tuple[threading.Event, threading.Event]
) -> None:
    begun, may_end = slow_first
    limit = SIZE * 5 // 2
    third = UPath("memory://cached/third.tar")
    third.write_bytes(b"3" * SIZE)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(read, tmp_path, FIRST, limit=limit)
        assert begun.wait(20)
        for shard in (SECOND, third):
            read(tmp_path, shard, limit=limit)
            assert sizes(tmp_path, ".tar") == [SIZE]
            assert sizes(tmp_path, ".partial") == [SIZE]
        may_end.set()
        assert first.result() == b"1" * 20
    assert sizes(tmp_path, ".tar") == [SIZE, SIZE]


def die_while_writing(folder: Path) -> None:
    FIRST.write_bytes(b"1" * SIZE)
    vars(shard_cache)["read_range"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    read(folder, FIRST)


@pytest.mark.parametrize("asked", [FIRST, SECOND])
def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: UPath
) -> None:
    writer = multiprocessing.get_context("forkserver").Process(
        target=die_while_writing, args=(tmp_path,)
    )
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert sizes(tmp_path, ".partial") == [SIZE]
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits for a process that is dead"))
    assert read(tmp_path, asked, limit=SIZE) in (b"1" * 20, b"2" * 20)
    assert not sizes(tmp_path, ".partial")


def test_a_full_disk_ends_the_run_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        wanted = rf"data.cache {tmp_path}: .*first.tar, {SIZE} bytes: No space.*; the disk at /.* has \d+ bytes free: free"
        with pytest.raises(
            ConfigError, match=wanted + r" the disk, or lower data.cache_gib, which is 9\.3"
        ):
            read(tmp_path, FIRST)
    assert not sizes(tmp_path, ".partial")
    assert read(tmp_path, FIRST) == b"1" * 20


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"data.cache .*/file/cache: cannot keep a copy of .*first.tar"
    ):
        read(tmp_path / "file" / "cache", FIRST)


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(sizes(tmp_path, ".tar")))
    read(tmp_path, FIRST)
    assert seen == [[]]
