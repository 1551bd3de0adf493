"""Metadata of a sample: its row in the index of its shard."""

from typing import NamedTuple

from megatron_vita.data.samples.records import Kind
from megatron_vita.media.video import VideoInfo


class Member(NamedTuple):
    """Position of a file's bytes in a shard."""

    name: str
    offset: int
    size: int


class SampleRow(NamedTuple):
    """Metadata of a sample.

    Attributes:
        key: key in the shard.
        is_text: the sample is raw text.
        pieces: kinds of its pieces in order, with the tokens of those that are text.
        image_sizes: (width, height) of its images after EXIF rotation; a pair's twice.
        videos: metadata of its videos; a pair's twice.
        members: its files by name.
        record: its JSON, if the shard, made by others, does not hold it.
    """

    key: str
    is_text: bool
    pieces: list[tuple[Kind, int]]
    image_sizes: list[tuple[int, int]]
    videos: list[VideoInfo]
    members: dict[str, Member]
    record: str = ""

    @property
    def is_pair(self) -> bool:
        """True for two conversations, of a chosen and a rejected answer."""
        return any(kind == Kind.BOUNDARY for kind, _ in self.pieces)
