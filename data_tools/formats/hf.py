"""Folders of Hugging Face `datasets`: Parquet or Arrow files with embedded images or videos.

A row is a record as of `megatron_vita/data/samples/foreign.py`; its media are bytes, {bytes, path}
or data URLs, which are written out, or paths, whose files are read from the media folder.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.formats.base import Candidate, Setting, find_files, write_medium
from data_tools.reading.samples import find_medium
from megatron_vita.data.samples.media_fields import FIELDS, Value
from megatron_vita.errors import DataError
from megatron_vita.media.data_urls import inline_content, is_inline

ROWS = 32  # rows read at a time: those with images are large
ERRORS = (pa.ArrowException, OSError, ValueError, EOFError)


def list_sources(paths: list[Path]) -> list[Path]:
    """List Parquet and Arrow files."""
    return find_files(paths, ".parquet", ".arrow")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """Yield the rows of a file."""
    # A missing file has no size; opening it raises the error that names it.
    size = 0
    if source.exists():
        size = source.stat().st_size
    if source.suffix.lower() == ".parquet":
        batches = _parquet(source)
    else:
        batches = _arrow(source)
    row = 0
    try:
        for batch, share in batches:
            # Without this check, damaged lengths and offsets would be believed.
            batch.validate(full=True)
            for start in range(len(batch)):
                make = partial(
                    _sample_of_row, batch.slice(start, 1), source=source, row=row, setting=setting
                )
                yield Candidate(f"row {row + 1}", make, int(share * size))
                row += 1
    except ERRORS as error:
        where = f"after row {row}" if row else "at all"
        raise DataError(f"{source}: cannot be read {where}: {error}") from error


def _parquet(source: Path) -> Iterator[tuple[pa.RecordBatch, float]]:
    with pq.ParquetFile(source, memory_map=False) as file:
        done = 0
        for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
            done += len(batch)
            yield batch, done / max(file.metadata.num_rows, 1)


def _arrow(source: Path) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Read an Arrow stream, as of `datasets`, or an Arrow file, as of other tools."""
    with pa.OSFile(str(source)) as file:
        # Both kinds of files may be called .arrow.
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        batches: Iterator[pa.RecordBatch]
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            for start in range(0, len(batch), ROWS):
                yield batch.slice(start, ROWS), file.tell() / max(file.size(), 1)


def _sample_of_row(batch: pa.RecordBatch, **place: Any) -> dict[str, Any]:
    columns = zip(batch.schema.names, batch.columns, strict=True)
    return _sample({name: _value(column[0], name) for name, column in columns}, **place)


def _value(scalar: pa.Scalar, name: str) -> Any:
    try:
        return scalar.as_py()
    except (*ERRORS, OverflowError) as error:
        if pa.types.is_temporal(scalar.type):
            # A time outside Python's range: no field of a sample is a time.
            return None
        raise DataError(f"{name} cannot be read: {error}") from error


def _sample(
    row_values: dict[str, Any], *, source: Path, row: int, setting: Setting
) -> dict[str, Any]:
    sample = setting.sample_of(row_values)
    for field in FIELDS:
        for i, value in enumerate(sample.get(field, [])):
            name = f"{row:08d}-{i}"
            if field == "videos":
                name = f"{row:08d}-video{i}"
            data = _content(value, f"{field}[{i}]", setting)
            sample[field][i] = write_medium(data, source=source, name=name, setting=setting)
    return sample


def _content(value: Value, name: str, setting: Setting) -> bytes:
    if isinstance(value, bytes):
        return value
    if is_inline(value):
        return inline_content(value)
    path = find_medium(value, name, root=setting.media)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} {value}: cannot read {path}: {error.strerror}") from error
