"""Folders of Hugging Face `datasets`: Parquet or Arrow files with images inside.

A row has a conversation (`messages`, `conversations` or `texts`), or `question` and `answer`, or a
caption (`caption` or `text`), and images in `images` or `image`: each {bytes, path}. Bytes are
written out; a path alone is taken from the media folder.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.formats.base import Candidate, Setting, find_files, write_medium
from data_tools.samples import find_medium
from megatron_vita.data.samples.third_party import (
    CHAT_FIELDS,
    caption_record,
    chat_messages,
    place_media,
)
from megatron_vita.errors import DataError

ROWS = 32  # read at a time: rows with images are large
CAPTIONS = ("caption", "text")
ERRORS = (pa.ArrowException, OSError, ValueError, EOFError)


def list_sources(paths: list[Path]) -> list[Path]:
    """Parquet and Arrow files."""
    return find_files(paths, ".parquet", ".arrow")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The rows of a file."""
    size, row = source.stat().st_size if source.exists() else 0, 0
    try:
        for batch, share in _parquet(source) if source.suffix == ".parquet" else _arrow(source):
            batch.validate(full=True)  # else a damaged length would be believed
            for values in batch.to_pylist():
                make = partial(_sample, values, source=source, row=row, setting=setting)
                yield Candidate(f"row {row}", make, int(share * size))
                row += 1
    except ERRORS as error:
        raise DataError(f"{source}: cannot be read on behind row {row - 1}: {error}") from error


def _parquet(source: Path) -> Iterator[tuple[pa.RecordBatch, float]]:
    with pq.ParquetFile(source, memory_map=False) as file:
        done = 0
        for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
            done += len(batch)
            yield batch, done / max(file.metadata.num_rows, 1)


def _arrow(source: Path) -> Iterator[tuple[pa.RecordBatch, float]]:
    """`datasets` writes streams; other tools files, whose first bytes tell them apart."""
    with pa.OSFile(str(source)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, len(batch), ROWS):
                yield batch.slice(start, ROWS), file.tell() / max(file.size(), 1)


def _sample(
    row_values: dict[str, Any], *, source: Path, row: int, setting: Setting
) -> dict[str, Any]:
    found = row_values.get("images") or row_values.get("image") or []
    images = [
        _write_image(image, name=f"{row:08d}-{i}", source=source, setting=setting)
        for i, image in enumerate(found if isinstance(found, list) else [found])
    ]
    media = {"images": images, "videos": []}
    sample = _conversation(row_values, media, setting.prompt) | (
        {"images": images} if images else {}
    )
    sample.pop("videos", None)
    return (
        {"id": row_values["id"], **sample}
        if isinstance(row_values.get("id"), str | int)
        else sample
    )


def _conversation(row: dict[str, Any], media: dict[str, list[str]], prompt: str) -> dict[str, Any]:
    turns = next((row[field] for field in CHAT_FIELDS if row.get(field)), None)
    if turns is not None:
        return {"messages": place_media(chat_messages(turns), media)}
    if "question" in row and "answer" in row:
        return {
            "messages": place_media(
                chat_messages([{"user": row["question"], "assistant": row["answer"]}]), media
            )
        }
    name = next((field for field in CAPTIONS if field in row), None)
    if name is None:
        known = ", ".join((*CHAT_FIELDS, "question and answer", *CAPTIONS))
        raise DataError(f"no text among the columns {sorted(row)}: {known} are known")
    return caption_record(row[name], media, prompt=prompt, name=name)


def _write_image(image: Any, *, name: str, source: Path, setting: Setting) -> str:
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(image, dict) and not data and image.get("path"):
        data = find_medium(image["path"], "image", root=setting.media).read_bytes()
    if not isinstance(data, bytes) or not data:
        raise DataError(f"image {name} is {image!r:.80}: bytes, or {{bytes, path}}, are needed")
    return write_medium(data, source=source, name=name, setting=setting)
