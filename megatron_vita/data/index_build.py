"""Makes a shard's index: the one place that reads whole shards."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_vita.data.index import SCHEMA, IndexHeader, SampleIndex, text_stamp
from megatron_vita.data.records import encode_record, is_raw_text, parse_record, pieces_of
from megatron_vita.data.shards import Member, ShardReader, scan_shard
from megatron_vita.errors import DataError
from megatron_vita.media.images import image_size
from megatron_vita.media.video import probe_video
from megatron_vita.text.tokenizer import Tokenizer


def build_index(shard: Path, tokenizer: Tokenizer, template: str) -> SampleIndex:
    """Scans a shard once and gives its index. DataError naming shard and key for a sample that cannot be read."""
    reader, size = ShardReader(), shard.stat().st_size
    rows = [
        _sample_columns(shard, key, members, reader=reader, size=size, tokenizer=tokenizer, template=template)
        for key, members in scan_shard(shard)
    ]
    reader.close()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    content = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    text = text_stamp(tokenizer, template)
    header = IndexHeader(
        shard_size=size, samples=len(rows), content=content, tokenizer=text["tokenizer"], template=text["template"]
    )
    return SampleIndex(table, header=header)


def _sample_columns(
    shard: Path,
    key: str,
    members: dict[str, Member],
    *,
    reader: ShardReader,
    size: int,
    tokenizer: Tokenizer,
    template: str,
) -> dict[str, Any]:
    name = f"{shard} sample {key}"
    if f"{key}.json" not in members:
        raise DataError(f"{name}: there is no {key}.json")
    record = parse_record(reader.read(shard, member=members[f"{key}.json"], shard_size=size), name)
    try:
        kinds, tokens = pieces_of(encode_record(record, tokenizer, template))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error

    def read_all(field: str) -> Iterator[tuple[str, bytes]]:
        for member in record[field]:
            if member not in members:
                raise DataError(f"{name}: {field} names {member}, which the shard does not hold")
            yield f"{shard} {member}", reader.read(shard, member=members[member], shard_size=size)

    sizes = [image_size(data, where) for where, data in read_all("images")]
    videos = [probe_video(data, where) for where, data in read_all("videos")]
    return {
        "key": key,
        "is_text": is_raw_text(record),
        "piece_kinds": [int(kind) for kind in kinds],
        "piece_tokens": tokens,
        "image_widths": [width for width, _ in sizes],
        "image_heights": [height for _, height in sizes],
        "video_durations": [video.duration for video in videos],
        "video_fps": [video.fps for video in videos],
        "video_frames": [video.frames for video in videos],
        "member_names": list(members),
        "member_offsets": [member.offset for member in members.values()],
        "member_sizes": [member.size for member in members.values()],
    }
