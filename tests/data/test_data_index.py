"""The index: all metadata, never the shard; refused where it does not fit."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vita.config import TextConfig
from megatron_vita.data.samples.records import Kind
from megatron_vita.data.shards.index import (
    find_index,
    old_index_path,
    read_header,
    read_index,
    text_stamp,
)
from megatron_vita.data.shards.index_build import build_index, build_sound_index
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.errors import DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.hugging_face import HuggingFaceTokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from tests.data.toy_data import clip, picture, talk, write_shard
from tests.indexes import index_shard
from tests.text.published import INTERNVL_TEMPLATE, QWEN, byte_level_bpe


def test_reading_an_index_needs_no_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = write_shard(tmp_path / "a.tar", range(10))
    path = index_shard(shard, tokenizer)
    size = shard.stat().st_size
    shard.unlink()
    index = read_index(path, text_stamp(ChatFormat(tokenizer)))
    assert (len(index), index.header.shard_size, index.keys()[3]) == (10, size, "s0003")
    row = index.row(1)
    assert row.image_sizes == [(200, 100), (90, 30)]
    assert (row.videos[0].frames, row.videos[0].duration, row.videos[0].fps) == (16, 2.0, 8.0)
    assert list(row.members) == [
        "s0001.image0.png",
        "s0001.image1.jpg",
        "s0001.json",
        "s0001.video0.mp4",
    ]
    kinds = [kind for kind, _ in row.pieces if kind >= Kind.IMAGE]
    assert kinds == [Kind.IMAGE, Kind.VIDEO, Kind.IMAGE]
    assert all(tokens > 0 for kind, tokens in row.pieces if kind < Kind.IMAGE)


def test_image_sizes_are_those_after_exif_rotation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    with SampleWriter(tmp_path / "a.tar") as writer:
        image = ShardMedia(".jpg", picture((120, 40), "red", format="JPEG", exif=exif))
        writer.write("k", record=talk("<image>", "b"), media={"image": [image]})
    assert build_index(tmp_path / "a.tar", ChatFormat(tokenizer)).row(0).image_sizes == [(40, 120)]


def test_an_index_of_another_tokenizer_is_refused_with_both_fingerprints(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = index_shard(write_shard(tmp_path / "a.tar", range(2)), tokenizer)
    with pytest.raises(
        DataError,
        match=f"made with tokenizer {tokenizer.fingerprint}, the recipe's tokenizer is 123",
    ):
        read_index(path, {"tokenizer": "123"})


def test_an_index_of_another_template_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = index_shard(write_shard(tmp_path / "a.tar", range(2)), tokenizer)
    with pytest.raises(DataError, match="made with template"):
        read_header(path, text_stamp(ChatFormat(tokenizer, TextConfig(template="plain"))))


def test_an_index_of_another_media_format_is_refused_by_its_name(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = index_shard(write_shard(tmp_path / "a.tar", range(2)), tokenizer)
    internvl = ChatFormat(tokenizer, TextConfig(media_format="internvl"))
    with pytest.raises(
        DataError, match=r"made with media_format long_vita, the recipe's .* internvl"
    ):
        read_header(path, text_stamp(internvl))


def test_a_sample_that_its_template_refuses_is_quarantined_by_its_turn(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with SampleWriter(path) as writer:
        writer.write("good", record=talk("a", "b"), media={})
        writer.write("bad", record=talk("a", "\n\nb"), media={})
    tokenizer = HuggingFaceTokenizer(
        byte_level_bpe(*QWEN).to_str(), added=(), chat_template=INTERNVL_TEMPLATE
    )
    chat = ChatFormat(tokenizer, TextConfig(template="jinja"))
    index, quarantine = build_sound_index(path, chat)
    assert index.keys() == ["good"]
    (entry,) = quarantine.entries
    assert entry.key == "bad"
    assert "sample bad: messages[1]: this answer shares a token" in entry.reason


def test_a_missing_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"a\.[0-9a-f]{12}\.index\.parquet: the shard has no index.*vita data index",
    ):
        find_index(tmp_path / "a.tar", {"tokenizer": "123"})


def test_the_one_index_of_older_versions_is_read_for_its_own_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shard = write_shard(tmp_path / "a.tar", range(2))
    text = text_stamp(ChatFormat(tokenizer))
    old = index_shard(shard, tokenizer).rename(old_index_path(shard))
    assert find_index(shard, text)[0] == old
    with pytest.raises(DataError, match=r"a\.index\.parquet: .*make one for it"):
        find_index(shard, text | {"tokenizer": "123"})
    new = index_shard(shard, tokenizer)
    assert find_index(shard, text)[0] == new != old


def test_files_that_are_no_index_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.index.parquet"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not an index"):
        read_index(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(DataError, match="not a sample index"):
        read_index(path)


def test_an_index_that_does_not_tell_its_rule_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = index_shard(write_shard(tmp_path / "a.tar", range(2)), tokenizer)
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"index"])
    assert header.pop("rule")
    assert header.pop("left_out")
    pq.write_table(table.replace_schema_metadata({"index": json.dumps(header)}), path)
    assert (len(read_index(path)), read_header(path).rule, read_header(path).left_out) == (
        2,
        "",
        "",
    )


def test_a_shard_without_samples_has_an_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = index_shard(write_shard(tmp_path / "a.tar", range(0)), tokenizer)
    assert len(read_index(path)) == 0


def test_indexes_differ_where_samples_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    contents = set()
    for image in (picture((40, 40), "red"), picture((40, 44), "red")):
        with SampleWriter(tmp_path / "a.tar") as writer:
            writer.write(
                "k", record=talk("<image>", "b"), media={"image": [ShardMedia(".png", image)]}
            )
        contents.add(build_index(tmp_path / "a.tar", ChatFormat(tokenizer)).header.content)
    assert len(contents) == 2


@pytest.mark.parametrize(
    ("record", "media", "names"),
    [
        (talk("<image>", "b"), {}, "sample k: .*1 places for images"),
        (talk("<image>", "b"), {"image": [ShardMedia(".png", b"no")]}, r"k\.image0\.png"),
        (talk("<video>", "b"), {"video": [ShardMedia(".mp4", clip()[:90])]}, r"k\.video0\.mp4"),
    ],
)
def test_a_bad_sample_is_named_by_shard_and_key(
    tmp_path: Path, tokenizer: Tokenizer, record: dict[str, Any], media: dict[str, Any], names: str
) -> None:
    with SampleWriter(tmp_path / "a.tar") as writer:
        writer.write("k", record=record, media=media)
    with pytest.raises(DataError, match=rf"a\.tar {names}"):
        build_index(tmp_path / "a.tar", ChatFormat(tokenizer))
