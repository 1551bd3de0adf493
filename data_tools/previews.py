"""Previews of samples as HTML: small pictures, frames with times, and the conversation."""

import base64
import io
import re
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from data_tools.statistics import DatasetStatistics
from megatron_vita.data.samples.records import REJECTED, is_pair, is_raw_text, parse_record
from megatron_vita.data.samples.rows import SampleRow
from megatron_vita.data.shards.index import read_index
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.storage import Location
from megatron_vita.errors import VitaError
from megatron_vita.media.images import open_image
from megatron_vita.media.video import decode_frames, frame_times
from megatron_vita.text.conversation import MediaPart, check_messages

SIDE = 144
FRAMES = 4
MOST_IMAGES = 6
MOST_TURNS = 6
MOST_CHARACTERS = 600


def previews(dataset: DatasetStatistics, count: int) -> Iterator[str]:
    """Yield `count` samples, evenly spread over a dataset's shards; errors are shown in their
    place."""
    starts = np.cumsum([0, *(header.samples for header in dataset.source.headers)])
    reader = ShardReader()
    count = min(count, int(starts[-1]))
    # The middles of equal parts, which are spread over all shards.
    for place in ((2 * i + 1) * int(starts[-1]) // (2 * count) for i in range(count)):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        shard = dataset.source.shards[number]
        index = read_index(dataset.source.indexes[number])
        row = index.row(place - int(starts[number]))
        try:
            yield _card(shard, row, index.header.shard_size, reader, dataset)
        except (VitaError, OSError) as error:
            yield _article(row.key, f'<p class="bad">{escape(str(error))}</p>')
    reader.close()


def _card(
    shard: Location, row: SampleRow, size: int, reader: ShardReader, dataset: DatasetStatistics
) -> str:
    def read(member: str) -> bytes:
        return reader.read(shard, member=row.members[member], shard_size=size)

    record = parse_record(row.record.encode() or read(f"{row.key}.json"), row.key)
    pictures = [
        _figure(open_image(read(name), name), f"image {i + 1}")
        for i, name in enumerate(record["images"])
    ]
    shown = pictures[:MOST_IMAGES]
    if len(pictures) > MOST_IMAGES:
        shown.append(f'<p class="none">and {len(pictures) - MOST_IMAGES} more</p>')
    # A pair's videos are listed twice.
    for name, info in zip(record["videos"], row.videos, strict=not row.is_pair):
        # Without a limit of the rate, so that a short clip shows several frames, too.
        times = frame_times(info, max_fps=1e9, max_frames=FRAMES)
        tiles = decode_frames(read(name), name, times=times, tile_size=SIDE)
        shown += [
            _figure(Image.fromarray(tile.transpose(1, 2, 0)), f"{time:.1f} s")
            for tile, time in zip(tiles, times, strict=True)
        ]
    figures = ""
    if shown:
        figures = f'<div class="pictures">{"".join(shown)}</div>'
    return _article(row.key, figures + "".join(_turns(record)))


def _article(key: str, content: str) -> str:
    return f'<article class="sample"><h4>{escape(key)}</h4>{content}</article>'


def _turns(record: dict[str, Any]) -> Iterator[str]:
    if is_raw_text(record):
        yield f'<p class="assistant"><b>text</b> {_cut(record["text"])}</p>'
        return
    numbers = dict.fromkeys(("image", "video"), 0)
    turns = check_messages(record)
    for turn in turns[:MOST_TURNS]:
        text = ""
        for part in turn.parts:
            if isinstance(part, MediaPart):
                numbers[part.kind] += 1
                text += f"[{part.kind} {numbers[part.kind]}]"
            else:
                text += part.text
        yield f'<p class="{turn.role}"><b>{turn.role}</b> {_cut(text)}</p>'
    if len(turns) > MOST_TURNS:
        yield f'<p class="none">and {len(turns) - MOST_TURNS} more turns</p>'
    if is_pair(record):
        yield f'<p class="assistant"><b>rejected</b> {_cut(record[REJECTED])}</p>'


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        short = text
    else:
        short = f"{text[:MOST_CHARACTERS]} … {len(text) - MOST_CHARACTERS:,} more"
    return re.sub(r"\n+", "<br>", escape(short.strip()))


def _figure(image: Image.Image, caption: str) -> str:
    image.thumbnail((2 * SIDE, SIDE))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
