"""Decomposition of a batch for display: its documents, and their tokens in runs of one kind."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_vita.config import Recipe
from megatron_vita.data.batch import TAIL_SOURCE, Batch
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.samples.encoding import Medium
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.sizes import counted
from megatron_vita.text.media_tokens import MEDIA_FORMATS
from megatron_vita.text.tokenizer_base import Tokenizer


class TokenRun(NamedTuple):
    """Consecutive tokens of one kind: "text", "loss", "tile", "frame" (with their tags) or
    "padding"."""

    kind: str
    text: str
    tokens: int


class MediumView(NamedTuple):
    """An image or a video: its tiles, counted in the pack from 0. `grid` is (columns, rows) of an
    image's cells, None for frames; an image of several cells has one more tile, its thumbnail."""

    tiles: range
    grid: tuple[int, int] | None
    thumbnail: int | None = None

    @property
    def cells(self) -> list[int]:
        """The tiles but for the thumbnail, row by row."""
        return [tile for tile in self.tiles if tile != self.thumbnail]


@dataclass(frozen=True, kw_only=True)
class DocumentView:
    """A document of a batch: its bounds in the pack with padding, and its tiles' indices in the
    pack."""

    title: str
    start: int
    stop: int
    runs: list[TokenRun]
    tiles: range
    pictures: list[MediumView]


@dataclass(frozen=True, kw_only=True)
class PackView:
    """A batch with all its tiles, for display."""

    title: str
    seq_length: int
    documents: list[DocumentView]
    tiles: np.ndarray  # [N,3,S,S] uint8
    labels: list[str]  # of each tile: "12.5 s" of a frame, "thumbnail", "column 2, row 1"


def view_pack(
    stream: PackStream,
    pack: int,
    *,
    recipe: Recipe,
    tokenizer: Tokenizer,
    names: list[str],
    title: str,
) -> PackView:
    """Decompose a pack of a stream; `names` are those of the datasets."""
    batch = stream[pack]
    media_format = MEDIA_FORMATS[recipe.text.media_format]
    media = [medium for document in stream.documents(pack) for medium in document.media]
    labels = [
        label
        for medium in media
        for label in _labels(medium, thumbnail_last=media_format.thumbnail_last)
    ]
    pictures = list(_pictures(media, thumbnail_last=media_format.thumbnail_last))
    runs = _Runs(
        batch,
        labels=labels,
        tile_tokens=recipe.model.vision.image_token_length,
        tokenizer=tokenizer,
    )
    documents = []
    placements = batch.placements.numpy()
    for i, (start, stop) in enumerate(itertools.pairwise(batch.document_starts.tolist())):
        source = int(batch.document_sources[i])
        if source == TAIL_SOURCE:
            name = "tail"
        else:
            name = f"document {i + 1}: {batch.sample_keys[i]} from {names[source]}"
        # Placements ascend, so that a document's tiles lie between its bounds.
        tiles = range(*np.searchsorted(placements, (start, stop)).tolist())
        documents.append(
            DocumentView(
                title=name,
                start=start,
                stop=stop,
                runs=list(runs.between(start, stop)),
                tiles=tiles,
                pictures=[picture for picture in pictures if picture.tiles.start in tiles],
            )
        )
    length = len(batch.input_ids)
    rows = int((batch.labels != IGNORED_LABEL).sum())
    summary = (
        f"{title}: {counted(len(batch.sample_keys), 'document')}, {batch.num_tokens} of {length} tokens "
        f"({batch.num_tokens / length:.1%}), {counted(rows, 'loss token')}, {counted(len(placements), 'tile')}"
    )
    return PackView(
        title=summary,
        seq_length=length,
        documents=documents,
        tiles=batch.tiles.numpy(),
        labels=labels,
    )


def describe(view: PackView) -> Iterator[str]:
    """Yield lines of text for each document, with tiles as [tile N], and text with loss after
    `loss|`."""
    yield view.title
    for document in view.documents:
        yield heading(document)
        for is_loss, runs in itertools.groupby(document.runs, key=lambda run: run.kind == "loss"):
            margin = "      | "
            if is_loss:
                margin = "  loss| "
            yield margin + "".join(run.text for run in runs).replace("\n", "\\n")


def heading(document: DocumentView) -> str:
    """Title of a document with its counts."""
    counts = {
        kind: sum(run.tokens for run in document.runs if run.kind == kind)
        for kind in ("loss", "padding")
    }
    tiles = ""
    if document.tiles:
        tiles = f", {tile_numbers(document.tiles)}"
    return (
        f"{document.title}: tokens {document.start + 1} to {document.stop}, "
        f"{counts['loss']} with loss, {counts['padding']} padding{tiles}"
    )


def tile_numbers(tiles: Sequence[int]) -> str:
    """Consecutive tiles as they are counted for people: tile 3, tiles 3 to 7."""
    if len(tiles) == 1:
        return f"tile {tiles[0] + 1}"
    return f"tiles {tiles[0] + 1} to {tiles[-1] + 1}"


def _pictures(media: Sequence[Medium], *, thumbnail_last: bool) -> Iterator[MediumView]:
    """The media of a pack, in the order of their tiles."""
    first = 0
    for medium in media:
        tiles = range(first, first + medium.num_tiles)
        thumbnail = None
        if medium.grid is not None and len(tiles) > 1:
            thumbnail = tiles[-1] if thumbnail_last else tiles[0]
        yield MediumView(tiles, medium.grid, thumbnail)
        first = tiles.stop


def _labels(medium: Medium, *, thumbnail_last: bool) -> list[str]:
    """Label of each tile of a medium."""
    if medium.grid is None:
        return [f"{time:.1f} s" for time in medium.times]
    cols, rows = medium.grid
    cells = [f"column {col + 1}, row {row + 1}" for row in range(rows) for col in range(cols)]
    if medium.num_tiles == 1:
        return ["image"]
    if thumbnail_last:
        return [*cells, "thumbnail"]
    return ["thumbnail", *cells]


def _tiles_of(placements: list[int], *, tile_tokens: int, length: int) -> np.ndarray:
    """Tile of each token, or -1; tags around a tile belong to it."""
    tiles = np.full(length, -1)
    for tile, first in enumerate(placements):
        tiles[first : first + tile_tokens] = tile
    # Tags second: those between adjacent tiles must not overwrite placeholders.
    for tile, first in enumerate(placements):
        for tag in (first - 1, first + tile_tokens):
            if 0 <= tag < length and tiles[tag] < 0:
                tiles[tag] = tile
    return tiles


class _Runs:
    """Groups a batch's tokens into runs."""

    def __init__(
        self, batch: Batch, *, labels: list[str], tile_tokens: int, tokenizer: Tokenizer
    ) -> None:
        self._labels = labels
        self._frames = batch.frames.tolist()
        self._ids = batch.input_ids.numpy()
        # A label at a position is the token after it: shifted back, it marks the token itself.
        self._loss = np.concatenate([[False], batch.labels.numpy()[:-1] != IGNORED_LABEL])
        self._tokenizer = tokenizer
        self._tile = _tiles_of(
            batch.placements.tolist(), tile_tokens=tile_tokens, length=len(self._ids)
        )

    def between(self, start: int, stop: int) -> Iterator[TokenRun]:
        end = self._unpadded_end(start, stop)
        for kind, group in itertools.groupby(range(start, end), key=self._kind):
            ids = [int(self._ids[i]) for i in group]
            if kind.startswith("tile"):
                tile = int(kind.removeprefix("tile "))
                name = f"tile {tile + 1}"
                if self._frames[tile]:
                    yield TokenRun("frame", f"[{name}, {self._labels[tile]}]", len(ids))
                else:
                    yield TokenRun("tile", f"[{name}]", len(ids))
            else:
                yield TokenRun(kind, self._tokenizer.decode(ids, skip_special=False), len(ids))
        if stop > end:
            yield TokenRun("padding", f"[padding {stop - end}]", stop - end)

    def _kind(self, position: int) -> str:
        if self._tile[position] >= 0:
            return f"tile {self._tile[position]}"
        if self._loss[position]:
            return "loss"
        return "text"

    def _unpadded_end(self, start: int, stop: int) -> int:
        # A text may itself end with the pad token, which then carries loss.
        while (
            stop > start
            and self._ids[stop - 1] == self._tokenizer.pad_id
            and not self._loss[stop - 1]
        ):
            stop -= 1
        return stop
