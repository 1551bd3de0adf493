"""Object stores: the same batches as from a disk, by range reads or through a cache of bounded
size, with faults."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import fsspec
import pytest
from upath import UPath

from megatron_vita import stores
from megatron_vita.config import Recipe
from megatron_vita.data.datasets import find_sources
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.loading.worker import PackTask
from megatron_vita.data.planning.plan import write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.shards import cache, index
from megatron_vita.data.shards.cache import ShardCache
from megatron_vita.data.shards.index import IndexHeader
from megatron_vita.data.shards.storage import find_files, read_range
from megatron_vita.errors import ConfigError, DataError, ShardError
from tests.data.s3_server import FaultyStore
from tests.data.toy_data import World, assert_same, changed, train_stream


def _stop_fork_server() -> None:
    """Have the next process of multiprocessing begin with the environment of now."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyStore]:
    server = FaultyStore()
    with server.as_s3(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "FIRST_PAUSE", 0.01)
        _stop_fork_server()
        yield server
    _stop_fork_server()
    server.close()


@pytest.fixture
def remote(store: FaultyStore, world: World, tmp_path: Path) -> tuple[Recipe, str]:
    """The toy world's shards and indexes in a bucket of their own; gives its recipe and the
    bucket's name."""
    store.faults = 0
    bucket = f"mix-{tmp_path.name.replace('_', '-').lower()}"[:60].rstrip("-")
    files = fsspec.filesystem("s3")
    files.mkdir(bucket)
    for path in (*world.root.glob("*.tar"), *world.root.glob("*.parquet")):
        files.put_file(str(path), f"{bucket}/deep/{path.name}")
    datasets = [
        {"name": name, "shards": f"s3://{bucket}/deep/{name}-*.tar"} for name in ("shapes", "more")
    ]
    recipe = changed(
        world.recipe, data={"train": datasets, "validation": [], "plan": str(tmp_path / "plan")}
    )
    plan, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    write_plan(plan, plan_path(recipe, "train"))
    return recipe, bucket


def stream_of(recipe: Recipe, world: World, **data: Any) -> PackStream:
    return open_split(
        changed(recipe, data=data), split="train", tokenizer=world.tokenizer, tile_share=(0, 1)
    )


def test_a_plan_of_remote_shards_is_that_of_local_ones(
    remote: tuple[Recipe, str], world: World
) -> None:
    recipe, _ = remote
    assert plan_path(recipe, "train").read_bytes() == plan_path(world.recipe, "train").read_bytes()


# Every pair of values meets in each half.
@pytest.mark.parametrize(
    ("faults", "num_workers", "cached"),
    [
        (0.0, 0, True),
        (0.2, 0, False),
        (0.0, 2, False),
        (0.2, 2, True),
        *(
            pytest.param(*case, marks=pytest.mark.full("each pair of values meets without it"))
            for case in [(0.0, 0, False), (0.2, 0, True), (0.0, 2, True), (0.2, 2, False)]
        ),
    ],
)
def test_batches_are_those_of_a_disk_whatever_fails(
    store: FaultyStore,
    remote: tuple[Recipe, str],
    world: World,
    tmp_path: Path,
    cached: bool,
    num_workers: int,
    faults: float,
) -> None:
    recipe, _ = remote
    stream = stream_of(recipe, world, cache=str(tmp_path / "cache") if cached else "")
    store.faults = faults
    store.reads = 0
    store.failed = 0
    local = train_stream(world)
    tasks = [PackTask(pack) for pack in range(len(stream))]
    for pack in read_packs(stream, tasks, num_workers=num_workers):
        assert not pack.damages
        assert_same(pack.batch, local[pack.batch.pack_id])
    assert store.reads > 0
    assert (store.failed > 0) == (faults > 0)


@pytest.mark.parametrize("first_asked", [1 << 16, 100])
def test_opening_reads_the_ends_of_remote_indexes_alone_and_many_at_a_time(
    remote: tuple[Recipe, str], world: World, monkeypatch: pytest.MonkeyPatch, first_asked: int
) -> None:
    recipe, _ = remote
    local = find_sources(world.recipe, "train", tokenizer=world.tokenizer)
    monkeypatch.setattr(index, "FOOTER_BYTES", first_asked)
    monkeypatch.setattr(index, "read_file", lambda path: pytest.fail(f"all of {path} is read"))
    all_three = threading.Barrier(3, timeout=20)

    read_header = index.read_header

    def waiting(path: UPath, text: dict[str, str]) -> IndexHeader:
        if path.name.startswith("shapes"):
            all_three.wait()
        return read_header(path, text)

    monkeypatch.setattr(index, "read_header", waiting)
    found = find_sources(recipe, "train", tokenizer=world.tokenizer)
    assert [source.headers for source in found] == [source.headers for source in local]


def test_a_cached_shard_is_read_once(
    store: FaultyStore, remote: tuple[Recipe, str], world: World, tmp_path: Path
) -> None:
    recipe, _ = remote
    stream = stream_of(recipe, world, cache=str(tmp_path / "cache"))
    for pack in range(len(stream)):
        stream[pack]
    store.reads = 0
    again = stream_of(recipe, world, cache=str(tmp_path / "cache"))
    for pack in range(len(again)):
        again[pack]
    assert store.reads == 2 * 4  # the header and an index of each of four shards, no shard


def test_the_cache_stays_within_its_limit_and_drops_what_was_used_least(
    remote: tuple[Recipe, str], world: World, tmp_path: Path
) -> None:
    _, bucket = remote
    found = sorted(find_files(f"s3://{bucket}/deep/*.tar"), key=lambda shard: shard.name)
    shards = [UPath(shard) for shard in found]
    sizes = [shard.stat().st_size for shard in shards]
    limit = sum(sizes[:2]) + sizes[3] // 2
    cache = ShardCache(tmp_path / "cache", limit=limit)
    for time, number in enumerate((0, 1, 0, 2, 3, 0)):
        descriptor = cache.open(shards[number], size=sizes[number])
        held = list((tmp_path / "cache").glob("*.tar"))
        assert sum(path.stat().st_size for path in held) <= limit
        os.utime(descriptor, ns=(time, time))  # a clock that does not stand still
        if number == 2:
            assert {path.name.split("-", 1)[1] for path in held} == {shards[0].name, shards[2].name}
        assert (
            os.pread(descriptor, sizes[number] + 1, 0)
            == (world.root / shards[number].name).read_bytes()
        )
        os.close(descriptor)
    with pytest.raises(
        ConfigError, match=r"data.cache_gib is .*: a shard of \d+ bytes does not fit"
    ):
        ShardCache(tmp_path / "small", limit=10).open(shards[0], size=sizes[0])


def open_all(cache: ShardCache, shards: list, sizes: list[int]) -> None:
    for _ in range(3):
        for shard, size in zip(shards, sizes, strict=True):
            descriptor = cache.open(shard, size=size)
            assert os.fstat(descriptor).st_size == size
            os.close(descriptor)


def test_processes_share_a_cache_and_copy_each_shard_once(
    store: FaultyStore, remote: tuple[Recipe, str], tmp_path: Path
) -> None:
    _, bucket = remote
    shards = find_files(f"s3://{bucket}/deep/*.tar")
    sizes = [shard.stat().st_size for shard in shards]
    cache = ShardCache(tmp_path / "cache", limit=sum(sizes))
    store.reads = 0
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=open_all, args=(cache, shards, sizes)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert store.reads == 4
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_store_that_fails_for_good_costs_the_sample_and_says_why(
    store: FaultyStore, remote: tuple[Recipe, str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    recipe, bucket = remote
    stream = stream_of(recipe, world)
    stream[0]
    store.faults = 1.0
    pack = stream.read(0)
    assert len(pack.damages) == len(pack.batch.sample_keys)
    assert f"s3://{bucket}/deep/" in pack.damages[0].reason
    assert "(2 attempts)" in pack.damages[0].reason


def test_a_shard_that_cannot_be_copied_stops_the_run_and_damages_no_sample(
    remote: tuple[Recipe, str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, bucket = remote
    with pytest.raises(
        ConfigError, match=r"data.cache_gib is .*: a shard of \d+ bytes does not fit"
    ):
        stream_of(recipe, world, cache=str(tmp_path / "small"), cache_gib=1e-6).read(0)

    def fail(*_: object) -> bytes:
        raise OSError("the store is down")

    monkeypatch.setattr(cache, "read_range", fail)
    with pytest.raises(
        ShardError, match=rf"s3://{bucket}/deep/.*tar: cannot copy the shard: the store is down"
    ):
        stream_of(recipe, world, cache=str(tmp_path / "cache")).read(0)


def test_missing_and_changed_remote_shards_stop_the_run(
    remote: tuple[Recipe, str], world: World
) -> None:
    recipe, bucket = remote
    stream = stream_of(recipe, world)
    files = fsspec.filesystem("s3")
    files.pipe_file(f"{bucket}/deep/more-000000.tar", b"another")
    files.invalidate_cache()
    with pytest.raises(
        ShardError,
        match=r"more-000000.tar: the shard has 7 bytes, its index was made of one with \d+",
    ):
        [stream[pack] for pack in range(len(stream))]
    again = stream_of(recipe, world)
    files.rm(f"{bucket}/deep/more-000000.tar")
    with pytest.raises(DataError, match=r"more-000000.tar: cannot open the shard: it is not there"):
        [again[pack] for pack in range(len(again))]


def test_an_answer_cut_short_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    place = UPath("memory://bucket/file.tar")
    place.write_bytes(b"0123456789")
    whole = place.fs.cat_file
    answers: list[Any] = []

    def cut(path: str, start: int, end: int) -> bytes:
        answers.append(whole(path, start=start, end=end)[: 3 if len(answers) < 2 else None])
        return answers[-1]

    monkeypatch.setattr(place.fs, "cat_file", cut)
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0)
    assert read_range(place, 2, 9) == b"2345678"
    assert list(map(len, answers)) == [3, 3, 7]


def test_hidden_files_of_a_store_are_found_by_their_names_alone() -> None:
    for name in ("a.tar", "._a.tar"):
        UPath(f"memory://hidden/{name}").write_bytes(b"tar")
    assert [path.name for path in find_files("memory://hidden/*.tar")] == ["a.tar"]
    assert [path.name for path in find_files("memory://hidden/._a.tar")] == ["._a.tar"]


def test_a_scheme_without_a_library_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://bucket/\*.tar: cannot be listed"):
        find_files("nosuch://bucket/*.tar")
