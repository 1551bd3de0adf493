"""Index beside each shard: metadata of its samples, so that no tar is scanned in training.

`train-000000.tar` has `train-000000.STAMP.index.parquet`, a row for each sample in shard order. It
does not depend on tiling or frame sampling, only on tokenizer, template and media format. STAMP is
a hash of these, so that runs with other ones have indexes of their own;
`train-000000.index.parquet`, of older versions, is read where it was made with the same.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from megatron_vita.data.samples.records import Kind
from megatron_vita.data.samples.rows import Member, SampleRow
from megatron_vita.data.shards.storage import Location, read_file, read_tail
from megatron_vita.errors import DataError
from megatron_vita.files import atomic_write
from megatron_vita.media.video import VideoInfo
from megatron_vita.text.chat_format import ChatFormat

FORMAT_VERSION = 5
STAMP = 12  # characters of a hash in an index's name
FOOTER_BYTES = 1 << 16  # first request for a remote index; most footers are shorter
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("is_text", pa.bool_()),
        ("record", pa.string()),
        ("piece_kinds", pa.list_(pa.int8())),
        ("piece_tokens", pa.list_(pa.int32())),
        ("image_widths", pa.list_(pa.int32())),
        ("image_heights", pa.list_(pa.int32())),
        ("video_durations", pa.list_(pa.float64())),
        ("video_fps", pa.list_(pa.float64())),
        ("video_frames", pa.list_(pa.int64())),
        ("member_names", pa.list_(pa.string())),
        ("member_offsets", pa.list_(pa.int64())),
        ("member_sizes", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """Metadata of an index, read from its footer alone.

    `rule` and `left_out` are stamps of the members' rule and the quarantine that it was made with;
    empty: unknown.
    """

    shard_size: int
    samples: int
    tokenizer: str
    template: str
    media_format: str
    content: str
    rule: str = ""
    left_out: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of the samples' metadata; short, since plans store that of each shard."""
        return self.content[:16]


class _MissingIndexError(DataError):
    """There is no such file."""


class SampleIndex:
    """Index of one shard."""

    def __init__(self, table: pa.Table, *, header: IndexHeader) -> None:
        self._table = table
        # Reading a value of a column of one chunk takes a quarter of the time of slicing the table.
        self._columns = dict(zip(table.column_names, table.combine_chunks().columns, strict=True))
        self.header = header

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, row: int) -> SampleRow:
        """Metadata of one sample."""
        values = {name: column[row].as_py() for name, column in self._columns.items()}
        members = zip(
            values["member_names"], values["member_offsets"], values["member_sizes"], strict=True
        )
        return SampleRow(
            key=values["key"],
            is_text=values["is_text"],
            pieces=[
                (Kind(k), n)
                for k, n in zip(values["piece_kinds"], values["piece_tokens"], strict=True)
            ],
            image_sizes=list(zip(values["image_widths"], values["image_heights"], strict=True)),
            videos=_videos(values),
            members={member[0]: Member(*member) for member in members},
            record=values["record"],
        )

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """List column as (values of all samples, number of values of each sample)."""
        column = self._table[name].combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False), np.diff(column.offsets.to_numpy())

    def column(self, name: str) -> np.ndarray:
        """Scalar column."""
        return self._table[name].to_numpy()

    def keys(self) -> list[str]:
        """Keys of the samples."""
        return self._table["key"].to_pylist()


def index_path[Place: (Path, UPath, Path | UPath)](shard: Place, text: Mapping[str, str]) -> Place:
    """Path of the index of a shard that is made with what `text_stamp` gives."""
    stamp = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:STAMP]
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.{stamp}.index.parquet")


def old_index_path[Place: (Path, UPath, Path | UPath)](shard: Place) -> Place:
    """Path of the one index of a shard that older versions wrote."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.parquet")


def find_index(shard: Location, text: Mapping[str, str]) -> tuple[Location, IndexHeader]:
    """Find the index of a shard for what `text_stamp` gives, and read its header.

    Raises:
        DataError: there is none, it cannot be read, or the one of an older version was made with
            another tokenizer or template.
    """
    path = index_path(shard, text)
    try:
        return path, read_header(path, text)
    except _MissingIndexError as missing:
        old = old_index_path(shard)
        try:
            return old, read_header(old, text)
        except _MissingIndexError:
            raise missing from None


def text_stamp(chat: ChatFormat) -> dict[str, str]:
    """Fingerprints that token counts of texts depend on."""
    return {
        "tokenizer": chat.tokenizer.fingerprint,
        "template": chat.fingerprint,
        "media_format": chat.text.media_format,
    }


def write_index(index: SampleIndex, path: Path) -> None:
    """Write an index atomically."""
    metadata = {"index": json.dumps(vars(index.header), sort_keys=True)}
    with atomic_write(path, concurrent=True) as partial:
        pq.write_table(index._table.replace_schema_metadata(metadata), partial)


def read_header(path: Location, text: Mapping[str, str] | None = None) -> IndexHeader:
    """Read the footer of an index.

    Args:
        path: the index.
        text: `text_stamp` of the tokenizer and template in use; None checks neither.

    Raises:
        DataError: the index is missing, damaged, or made with another tokenizer or template.
    """
    with _opened(path, footer_only=True) as file:
        return _header(file.schema_arrow, path, text)


def read_index(path: Location, text: Mapping[str, str] | None = None) -> SampleIndex:
    """Read an index, never the shard; raises as `read_header`."""
    with _opened(path, footer_only=False) as file:
        header = _header(file.schema_arrow, path, text)
        return SampleIndex(file.read(use_threads=False), header=header)


@contextmanager
def _opened(path: Location, *, footer_only: bool) -> Iterator[pq.ParquetFile]:
    """Open the Parquet file of an index; errors inside the block become DataErrors naming it."""
    try:
        source: Path | io.BytesIO
        if isinstance(path, Path):
            source = path
        elif footer_only:
            source = io.BytesIO(_read_footer(path))
        else:
            source = io.BytesIO(read_file(path))
        with pq.ParquetFile(source, memory_map=False) as file:
            yield file
    except FileNotFoundError:
        raise _MissingIndexError(
            f"{path}: the shard has no index for this tokenizer and template; make it: "
            "vita data index RECIPE"
        ) from None
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not an index: {error}; make it again with vita data index"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be read: {error}; make it again with vita data index"
        ) from error


def _read_footer(path: UPath) -> bytes:
    """Read the end of a remote Parquet file, with its whole footer."""
    # The length of the footer stands before the last four bytes, which are a signature.
    tail = read_tail(path, FOOTER_BYTES)
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed <= len(tail):
        return tail
    return read_tail(path, needed)


def _header(schema: pa.Schema, path: Location, text: Mapping[str, str] | None) -> IndexHeader:
    try:
        header = IndexHeader(**json.loads((schema.metadata or {})[b"index"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a sample index; make it again with vita data index"
        ) from error
    if header.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: index format {header.format_version}, this version reads {FORMAT_VERSION}; "
            "make it again with vita data index"
        )
    for field, now in (text or {}).items():
        if (then := getattr(header, field)) != now:
            raise DataError(
                f"{path}: token counts were made with {field} {then}, the recipe's {field} is "
                f"{now}; make one for it with vita data index"
            )
    return header


def _videos(values: dict[str, list[Any]]) -> list[VideoInfo]:
    columns = zip(
        values["video_durations"], values["video_fps"], values["video_frames"], strict=True
    )
    return [
        VideoInfo(duration=duration, fps=fps, frames=frames) for duration, fps, frames in columns
    ]
