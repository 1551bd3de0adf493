"""Shards: same bytes for the same samples, whole or not at all, readable by webdataset, read by
offset."""

import os
from pathlib import Path

import pytest
import webdataset

from megatron_vita.data.samples.records import parse_record
from megatron_vita.data.samples.rows import Member
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.tar import SampleWriter, scan_shard
from megatron_vita.errors import DataError
from tests.data.toy_data import toy_sample, write_shard


def test_same_samples_give_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / name / "a.tar", range(8)) for name in ("x", "y"))
    assert first.read_bytes() == second.read_bytes()


def test_webdataset_reads_the_shard(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(3))
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["s0000", "s0001", "s0002"]
    assert samples[1]["video0.mp4"] == toy_sample(1)[1]["video"][0].data
    record = parse_record(samples[1]["json"], "s0001")
    assert record["images"] == ["s0001.image0.png", "s0001.image1.jpg"]
    assert record["videos"] == ["s0001.video0.mp4"]


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError), SampleWriter(tmp_path / "a.tar") as writer:
        writer.write("k", record={"messages": object()}, media={})
    assert list(tmp_path.iterdir()) == []


def test_members_are_read_by_offset(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(5))
    members = {sample.key: sample.members for sample in scan_shard(shard)}["s0004"]
    member = members["s0004.image0.png"]
    data = ShardReader().read(shard, member=member, shard_size=shard.stat().st_size)
    assert data == toy_sample(4)[1]["image"][0].data


def test_a_truncated_tar_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(5))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(DataError, match=r"a\.tar: not a readable \.tar shard"):
        list(scan_shard(shard))


def test_a_shard_changed_since_its_index_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(2))
    size = shard.stat().st_size
    with pytest.raises(
        DataError, match=f"has {size} bytes, its index was made of one with {size + 1}"
    ):
        ShardReader().read(shard, member=Member("x", 0, 1), shard_size=size + 1)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tar: cannot open the shard"):
        ShardReader().read(tmp_path / "gone.tar", member=Member("x", 0, 1), shard_size=1)


def test_a_reader_keeps_few_shards_open(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{i}.tar", range(1)) for i in range(5)]
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(max_open=2)
    for shard in shards * 2:
        reader.read(shard, member=Member("x", 0, 10), shard_size=shard.stat().st_size)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"messages": 3}'])
def test_a_record_that_is_no_sample_is_named(data: bytes) -> None:
    with pytest.raises(DataError, match="shard sample k"):
        parse_record(data, "shard sample k")
