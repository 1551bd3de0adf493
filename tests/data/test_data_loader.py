"""The loader: packs in order whatever happens to its processes, and what cannot be read is masked,
not fatal."""

import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from megatron_vita.data.batch import Batch, mask_documents
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.stream import PackStream, ReadPack
from megatron_vita.data.loading.worker import PackTask
from megatron_vita.data.planning.plan import write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.errors import DataError, ShardError, VitaError
from megatron_vita.layout.slicing import IGNORED_LABEL
from tests.data.hostile_streams import hostile
from tests.data.toy_data import World, assert_same, changed, damage, train_stream, write_shard
from tests.forked import run_program
from tests.indexes import index_shard


def tasks(stream: PackStream) -> list[PackTask]:
    return [PackTask(pack) for pack in range(len(stream))]


def masked(stream: PackStream, batch: Batch, documents: list[int]) -> Batch:
    encoder = stream.encoders[0]
    rows = encoder.vision.image_token_length
    return mask_documents(batch, documents, pad_id=encoder.tokenizer.pad_id, rows_per_tile=rows)


def readers() -> list[BaseProcess]:
    """The loader's processes, and not those that others have left."""
    return [
        process
        for process in multiprocessing.active_children()
        if isinstance(process, ForkServerProcess)
    ]


def assert_workers_end() -> None:
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not readers()


@pytest.mark.parametrize(("num_workers", "prefetch"), [(0, 1), (1, 1), (1, 4), (3, 2), (3, 7)])
def test_order_and_content_do_not_depend_on_workers_or_prefetch(
    world: World, num_workers: int, prefetch: int
) -> None:
    stream = train_stream(world, (1, 2))
    ids = [3, 0, 2, 1, 3]
    packs = list(read_packs(stream, map(PackTask, ids), num_workers=num_workers, prefetch=prefetch))
    assert [pack.batch.pack_id for pack in packs] == ids
    for pack in packs:
        assert_same(pack.batch, stream[pack.batch.pack_id])
        assert not pack.damages
    assert_workers_end()


def test_the_loader_takes_endless_tasks_and_ends_with_its_iterator(world: World) -> None:
    packs = read_packs(train_stream(world), repeat(PackTask(1)), num_workers=2)
    assert [next(packs).batch.pack_id for _ in range(3)] == [1, 1, 1]
    assert len(readers()) == 2
    packs.close()  # type: ignore[attr-defined]  # a generator
    assert_workers_end()


def test_tiles_outlive_the_process_that_decoded_them(world: World) -> None:
    stream = train_stream(world)
    packs = [pack.batch for pack in read_packs(stream, tasks(stream), num_workers=1)]
    assert_workers_end()
    for batch in packs:
        assert torch.equal(batch.tiles, stream[batch.pack_id].tiles)


def test_processes_killed_at_random_points_lose_and_repeat_nothing(world: World) -> None:
    stream = train_stream(world)
    draw = random.Random(5)
    ids = [draw.randrange(len(stream)) for _ in range(60)]
    found: list[ReadPack] = []
    for pack in read_packs(stream, map(PackTask, ids), num_workers=2, prefetch=4):
        found.append(pack)
        victims = readers()
        if len(found) <= 50 and victims:
            time.sleep(draw.random() * 0.02)
            with suppress(ProcessLookupError):  # it had not yet been replaced
                os.kill(draw.choice(victims).pid, signal.SIGKILL)
    assert [pack.batch.pack_id for pack in found] == ids
    whole = {pack: stream[pack] for pack in set(ids)}
    for pack in found:
        assert_same(pack.batch, whole[pack.batch.pack_id])
        assert not pack.damages


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("hang", "no progress within data.sample_seconds 5"),
        ("die", "2 processes ended .*-11"),
        ("die_of_memory", "5 processes ended .*-9"),
    ],
)
def test_a_sample_that_hangs_or_kills_its_reader_costs_itself_alone(
    world: World, deed: str, reason: str
) -> None:
    whole = train_stream(world)
    stream = hostile(train_stream(world), deed, pack=2, document=1)
    packs = list(
        read_packs(
            stream, tasks(stream), num_workers=2, sample_seconds=5 if deed == "hang" else 300
        )
    )
    for pack in packs:
        wanted = whole[pack.batch.pack_id]
        if pack.batch.pack_id != 2:
            assert_same(pack.batch, wanted)
            continue
        (event,) = pack.damages
        assert (event.pack, event.document, event.key) == (2, 1, wanted.sample_keys[1])
        with pytest.raises(DataError, match=reason):
            raise DataError(event.reason)
        assert_same(masked(whole, pack.batch, [1]), masked(whole, wanted, [1]))


def test_a_sample_whose_readers_die_in_different_ways_costs_itself_alone(
    world: World, tmp_path: Path
) -> None:
    stream = hostile(train_stream(world), "die_in_turns", pack=0, memory=str(tmp_path / "deaths"))
    (pack,) = read_packs(stream, tasks(stream)[:1], num_workers=1)
    assert "3 processes ended" in pack.damages[0].reason


@pytest.mark.alone
def test_a_pack_that_takes_long_is_not_taken_for_a_hang_of_a_sample(world: World) -> None:
    stream = hostile(train_stream(world), "dawdle", pack=0)
    pack = next(read_packs(stream, tasks(stream), num_workers=1, sample_seconds=1))
    assert len(pack.batch.sample_keys) >= 4  # so it takes longer than a sample may
    assert not pack.damages


def test_a_reader_killed_once_from_outside_costs_no_sample(world: World, tmp_path: Path) -> None:
    stream = hostile(
        train_stream(world), "die_once", pack=1, document=0, memory=str(tmp_path / "done")
    )
    packs = list(read_packs(stream, tasks(stream), num_workers=1))
    assert (tmp_path / "done").exists()
    assert not any(pack.damages for pack in packs)
    assert_same(packs[1].batch, train_stream(world)[1])


def test_readers_that_die_before_they_read_anything_stop_the_run(world: World) -> None:
    stream = hostile(train_stream(world), "start_dying", pack=0)
    with pytest.raises(
        VitaError, match=r"3 loader processes ended \(exit code -11\) before they read anything"
    ):
        list(read_packs(stream, tasks(stream), num_workers=1))
    assert_workers_end()


UNGUARDED = """
import pickle, sys
from pathlib import Path
from tests.data.toy_data import train_stream
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.worker import PackTask

stream = train_stream(pickle.loads(Path(sys.argv[1]).read_bytes()))
list(read_packs(stream, [PackTask(0)], num_workers=1))
"""


def test_a_program_without_its_main_condition_is_told_of_it(world: World, tmp_path: Path) -> None:
    (tmp_path / "world.pickle").write_bytes(pickle.dumps(world))
    (tmp_path / "job.py").write_text(UNGUARDED)
    ended = run_program(str(tmp_path / "job.py"), str(tmp_path / "world.pickle"))
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("megatron_vita.errors.VitaError: 3 loader processes ended (exit code 1)")
    assert 'needs `if __name__ == "__main__":` before its calls' in last


def test_readers_that_hang_before_they_read_anything_stop_the_run(world: World) -> None:
    stream = hostile(train_stream(world), "start_hanging", pack=0)
    with pytest.raises(
        VitaError, match=r"3 loader processes were silent for 1 seconds before they read anything"
    ):
        list(read_packs(stream, tasks(stream), num_workers=1, sample_seconds=1))
    assert_workers_end()


def test_a_slow_start_is_not_taken_for_a_hang(world: World) -> None:
    stream = hostile(train_stream(world), "start_slowly", pack=0)
    (pack,) = read_packs(stream, tasks(stream)[:1], num_workers=1, sample_seconds=4)
    assert not pack.damages


def test_a_mistake_of_ours_is_shown_with_its_traceback(world: World) -> None:
    stream = hostile(train_stream(world), "break", pack=0)
    with pytest.raises(
        RuntimeError, match=r"pack 1 failed:\n(?s:.*)in read(?s:.*)a mistake of ours"
    ):
        list(read_packs(stream, tasks(stream), num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("suffix", [".png", ".json", ".mp4"])
def test_a_damaged_sample_is_blank_and_reported(
    own_world: World, num_workers: int, suffix: str
) -> None:
    whole = train_stream(own_world)
    before = [whole[pack] for pack in range(len(whole))]
    name = damage(own_world, suffix)
    stream = train_stream(own_world)
    events = []
    for pack in read_packs(stream, tasks(stream), num_workers=num_workers):
        wanted = before[pack.batch.pack_id]
        documents = [event.document for event in pack.damages]
        assert_same(masked(stream, pack.batch, documents), masked(stream, wanted, documents))
        events += pack.damages
    (event,) = events
    assert (event.shard, event.key) == ("more-000000.tar", name.split(".")[0])
    assert "Traceback" not in event.reason
    assert "more-000000.tar" in event.reason


@pytest.mark.parametrize("num_workers", [0, 1])
def test_documents_to_skip_are_not_read(own_world: World, num_workers: int) -> None:
    key = damage(own_world).split(".")[0]
    stream = train_stream(own_world)
    (pack, document), *_ = [
        (pack, keys.index(key))
        for pack in range(len(stream))
        if key in (keys := stream.read(pack).batch.sample_keys)
    ]
    (found,) = read_packs(stream, [PackTask(pack, frozenset([document]))], num_workers=num_workers)
    assert not found.damages


@pytest.mark.parametrize("share", [(0, 1), (1, 3)])
def test_a_masked_document_is_pad_tokens_without_loss_and_black_tiles(
    world: World, share: tuple[int, int]
) -> None:
    stream = train_stream(world, share)
    for pack in range(len(stream)):
        batch = stream[pack]
        for document in range(len(batch.sample_keys)):
            start, stop = batch.document_starts[document : document + 2].tolist()
            blank = masked(stream, batch, [document])
            assert (blank.input_ids[start:stop] == world.tokenizer.pad_id).all()
            assert (blank.labels[start:stop] == IGNORED_LABEL).all()
            inside = (batch.placements >= start) & (batch.placements < stop)
            rows = torch.arange(stream.encoders[0].vision.image_token_length)
            places = (blank.placements[inside][:, None] + rows).flatten()
            assert torch.equal(places, start + torch.arange(len(places)))
            assert len(places) <= stop - start
            mine = inside[batch.tile_ids]
            assert (blank.tiles[mine] == 0).all()
            again = stream[pack]
            assert torch.equal(blank.tiles[~mine], again.tiles[~mine])
            outside = torch.ones(len(batch.labels), dtype=torch.bool)
            outside[start:stop] = False
            assert torch.equal(blank.labels[outside], again.labels[outside])
            batch = again


def test_a_vanished_shard_stops_the_run(own_world: World) -> None:
    stream = train_stream(own_world)
    (own_world.root / "more-000000.tar").unlink()
    with pytest.raises(DataError, match=r"more-000000\.tar: cannot open the shard"):
        list(read_packs(stream, tasks(stream), num_workers=1))


def iterate_slowly(packs: Iterator[ReadPack], seconds: float) -> int:
    count = 0
    for _ in packs:
        count += 1
        time.sleep(seconds)
    return count


def test_a_pause_of_the_trainer_is_not_taken_for_a_hang(world: World) -> None:
    stream = train_stream(world)
    packs = read_packs(stream, tasks(stream)[:3], num_workers=1, sample_seconds=3)
    assert iterate_slowly((pack for pack in packs if not pack.damages), 5.0) == 3


def test_a_plan_replaced_while_a_run_has_it_open_ends_the_run(own_world: World) -> None:
    stream = train_stream(own_world)
    plan, _ = make_plan(
        changed(own_world.recipe, data={"seed": 7}), "train", tokenizer=own_world.tokenizer
    )
    write_plan(plan, plan_path(own_world.recipe, "train"))
    with pytest.raises(
        ShardError, match=r"train\.arrow: the plan was replaced by another while a run has it open"
    ):
        next(read_packs(stream, tasks(stream), num_workers=1))
    plan_path(own_world.recipe, "train").unlink()
    with pytest.raises(
        ShardError, match=r"train\.arrow: there is no plan.* replaced while a run has it open"
    ):
        next(read_packs(stream, tasks(stream), num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_index_made_anew_while_a_run_has_the_plan_open_ends_the_run(
    own_world: World, num_workers: int
) -> None:
    stream = train_stream(own_world)
    shard = write_shard(own_world.root / "more-000000.tar", range(31, 41))
    index_shard(shard, own_world.tokenizer)
    with pytest.raises(
        ShardError,
        match=r"more-000000\.\w+\.index\.parquet: the index was rebuilt after the plan",
    ):
        list(read_packs(stream, tasks(stream), num_workers=num_workers))
