"""From a sample to a document: token ids, labels, and which tiles go where; and its length from the index alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from megatron_vita.config import MediaConfig, VisionConfig
from megatron_vita.data.index import SampleIndex, SampleRow
from megatron_vita.errors import DataError
from megatron_vita.media.images import open_image
from megatron_vita.media.tiling import Grid, choose_grid, cut_tiles, num_tiles
from megatron_vita.media.video import VideoInfo, decode_frames, frame_times, num_frames
from megatron_vita.text.conversation import Turn, check_messages
from megatron_vita.text.media_tokens import (
    MediaTokens,
    count_image_tokens,
    count_video_tokens,
    image_tokens,
    video_tokens,
)
from megatron_vita.text.template import MediaPiece, encode_turns
from megatron_vita.text.tokenizer import Tokenizer

NO_LOSS = -100


class Medium(NamedTuple):
    """An image or video of a document, in file `member`. A video has no grid, an image no frame times (seconds)."""

    member: str
    num_tiles: int
    grid: Grid | None
    times: list[float]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A sample ready to be packed.

    `input_ids` and `labels` are int64 [L]; a label is the next token where that one carries loss, else -100.
    `placements` int64 [N] holds the position of each tile's first placeholder; `media` has N tiles in the same order.
    """

    key: str
    input_ids: np.ndarray
    labels: np.ndarray
    placements: np.ndarray
    media: list[Medium]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class DocumentFormat:
    """All that turns a sample into a document."""

    tokenizer: Tokenizer
    template: str
    media: MediaConfig
    vision: VisionConfig
    text_only: bool = False


def newline_length(tokenizer: Tokenizer) -> int:
    """Tokens of the newline that begins a row of tiles."""
    return len(tokenizer.encode("\n"))


def document_lengths(
    index: SampleIndex, *, media: MediaConfig, vision: VisionConfig, newline_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles of each sample of an index, int64 each, from metadata alone."""

    @lru_cache(maxsize=100_000)
    def of_image(width: int, height: int) -> tuple[int, int]:
        grid = _grid((width, height), media, vision)
        length = vision.image_token_length
        return count_image_tokens(grid, image_token_length=length, newline_length=newline_length), num_tiles(grid)

    def of_video(duration: float, fps: float, frames: int) -> tuple[int, int]:
        info = VideoInfo(duration=duration, fps=fps, frames=frames)
        count = num_frames(info, max_fps=media.max_fps, max_frames=media.max_frames)
        return count_video_tokens(count, image_token_length=vision.image_token_length), count

    tokens = _sum_by_sample(*index.ragged("turn_tokens"))
    tiles = np.zeros(len(index), dtype=np.int64)
    for columns, measure in (
        (("image_widths", "image_heights"), of_image),
        (("video_durations", "video_fps", "video_frames"), of_video),
    ):
        counts = index.ragged(columns[0])[1]
        values = zip(*(index.ragged(name)[0].tolist() for name in columns), strict=True)
        measured = np.array([measure(*value) for value in values], dtype=np.int64).reshape(-1, 2)
        tokens += _sum_by_sample(measured[:, 0], counts)
        tiles += _sum_by_sample(measured[:, 1], counts)
    return tokens, tiles


def build_document(record: dict[str, Any], row: SampleRow, *, form: DocumentFormat) -> Document:
    """The document of a sample: its JSON `record` and its `row` of the index.

    DataError if the tags do not fit the media.
    """
    images = image_media(zip(record["images"], row.image_sizes, strict=True), form=form)
    videos = video_media(zip(record["videos"], row.videos, strict=True), form=form)
    return assemble_document(check_messages(record), key=row.key, images=images, videos=videos, form=form)


def assemble_document(
    turns: Iterable[Turn], *, key: str, images: Iterable[Medium], videos: Iterable[Medium], form: DocumentFormat
) -> Document:
    """The turns' tokens in order, each tag replaced by its placeholder sequence (Long-VITA, arXiv 2502.05177).

    DataError for media where the model is text-only.
    """
    media = {"image": iter(images), "video": iter(videos)}
    ids: list[int] = []
    loss: list[bool] = []
    used: list[Medium] = []
    placements: list[int] = []
    for piece in chain.from_iterable(encode_turns(turns, form.tokenizer, form.template)):
        if not isinstance(piece, MediaPiece):
            ids += piece.ids
            loss += [piece.loss] * len(piece.ids)
            continue
        medium = next(media[piece.kind])
        if form.text_only:
            raise DataError(f"{medium.member}: the model takes no {piece.kind}s, since model.text_only is true")
        used.append(medium)
        sequence = _placeholders(medium, form)
        placements += [len(ids) + offset for offset in sequence.offsets]
        ids += sequence.ids
        loss += [False] * len(sequence.ids)
    input_ids = np.array(ids, dtype=np.int64)
    return Document(
        key=key,
        input_ids=input_ids,
        labels=_shifted_labels(input_ids, np.array(loss, dtype=bool)),
        placements=np.array(placements, dtype=np.int64),
        media=used,
    )


def _placeholders(medium: Medium, form: DocumentFormat) -> MediaTokens:
    length = form.vision.image_token_length
    if medium.grid is not None:
        return image_tokens(medium.grid, image_token_length=length, tokenizer=form.tokenizer)
    return video_tokens(medium.num_tiles, image_token_length=length, tokenizer=form.tokenizer)


def decode_tiles(medium: Medium, data: bytes, *, name: str, tiles: range, form: DocumentFormat) -> np.ndarray:
    """Tiles `tiles` of a medium, uint8 [n,3,S,S]; of a video only these frames are decoded. DataError by `name`."""
    size = form.vision.image_size
    if medium.grid is None:
        times = medium.times[tiles.start : tiles.stop]
        return decode_frames(data, name, times=times, tile_size=size, normalization=form.media.normalization)
    return cut_tiles(open_image(data, name), grid=medium.grid, tile_size=size)[tiles.start : tiles.stop]


def _shifted_labels(input_ids: np.ndarray, loss: np.ndarray) -> np.ndarray:
    labels = np.full_like(input_ids, NO_LOSS)
    labels[:-1] = np.where(loss[1:], input_ids[1:], NO_LOSS)
    return labels


def _grid(size: tuple[int, int], media: MediaConfig, vision: VisionConfig) -> Grid:
    return choose_grid(size, tile_size=vision.image_size, min_tiles=media.min_tiles, max_tiles=media.max_tiles)


def image_media(images: Iterable[tuple[str, tuple[int, int]]], *, form: DocumentFormat) -> Iterator[Medium]:
    """Images given as (member, (width, height)), each with the grid it is cut by."""
    for member, size in images:
        grid = _grid(size, form.media, form.vision)
        yield Medium(member, num_tiles(grid), grid, [])


def video_media(videos: Iterable[tuple[str, VideoInfo]], *, form: DocumentFormat) -> Iterator[Medium]:
    """Videos given as (member, info), each with the times of its frames."""
    for member, info in videos:
        times = frame_times(info, max_fps=form.media.max_fps, max_frames=form.media.max_frames)
        yield Medium(member, len(times), None, list(times))


def _sum_by_sample(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    stops = np.cumsum(counts, dtype=np.int64)
    return totals[stops] - totals[stops - counts]


def check_length(document: Document, *, name: str, tokens: int, tiles: int) -> None:
    """DataError if a document is not what the plan counted."""
    found = (len(document), len(document.placements))
    if found != (tokens, tiles):
        raise DataError(
            f"{name}: the sample has {found[0]} tokens and {found[1]} tiles, the plan counted {tokens} and {tiles}: "
            "the index does not describe this shard; make index and plan again"
        )
