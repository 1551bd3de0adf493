"""Placeholder token sequences of images and videos, and their lengths."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_vita.text.conversation import MediaPart, TextPart
from megatron_vita.text.tokenizer_base import MEDIA_TOKENS, Tokenizer


@dataclass(frozen=True)
class MediaTokens:
    """Token ids of one image or video.

    `offsets` holds the index in `ids` of each tile's first placeholder, in tile order: cells row by
    row, frames in time.
    """

    ids: list[int]
    offsets: list[int]


class MediaFormat(ABC):
    """Placeholder format of images and videos; a tile has `image_token_length` placeholders."""

    special_tokens: ClassVar[tuple[str, ...]]  # special tokens of the format
    thumbnail_last: ClassVar[bool]  # the thumbnail is the last tile of an image, else the first
    video_opening: ClassVar[str]  # text before a video's first frame

    def __init__(self, tokenizer: Tokenizer, *, image_token_length: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_length = image_token_length

    @staticmethod
    @abstractmethod
    def laid_out(parts: Sequence[TextPart | MediaPart]) -> list[TextPart | MediaPart]:
        """Insert the text that the format writes between the parts of a content given as a list."""

    @abstractmethod
    def image(self, grid: tuple[int, int]) -> MediaTokens:
        """Tokens of an image cut into `grid` (cols, rows), with a thumbnail if it has several
        cells."""

    @abstractmethod
    def video(self, frames: int) -> MediaTokens:
        """Tokens of a video, without `video_opening`."""

    @abstractmethod
    def image_length(self, grid: tuple[int, int]) -> int:
        """Number of ids of `image`."""

    @abstractmethod
    def video_length(self, frames: int) -> int:
        """Number of ids of `video`."""

    def _wrapped(self, opening: str, context: str, closing: str, *, tiles: int = 1) -> list[int]:
        of = self.tokenizer.special_id
        return [of(opening), *[of(context)] * (self.image_token_length * tiles), of(closing)]


class LongVitaFormat(MediaFormat):
    """Placeholder format of Long-VITA (arXiv 2502.05177), with a tag around each tile.

    Image: `<img>` thumbnail `</img>`; of a grid of several cells, then for each row a newline and
    `<patch>` cell `</patch>` for each of its cells. Video: `<vid>` frame `</vid>` for each frame.
    In a content given as a list, a newline separates a medium from a text that does not begin with
    one.
    """

    special_tokens = MEDIA_TOKENS
    thumbnail_last = False
    video_opening = ""

    @staticmethod
    def laid_out(parts: Sequence[TextPart | MediaPart]) -> list[TextPart | MediaPart]:
        """See MediaFormat."""
        spaced: list[TextPart | MediaPart] = []
        for part in parts:
            follows = bool(spaced) and isinstance(spaced[-1], MediaPart)
            if follows and isinstance(part, TextPart) and not part.text.startswith("\n"):
                part = TextPart("\n" + part.text)
            spaced.append(part)
        return spaced

    def image(self, grid: tuple[int, int]) -> MediaTokens:
        """See MediaFormat."""
        cols, rows = grid
        ids = self._wrapped("<img>", "<IMG_CONTEXT>", "</img>")
        offsets = [1]
        if cols * rows > 1:
            newline = self.tokenizer.encode("\n")
            cell = self._wrapped("<patch>", "<PATCH_CONTEXT>", "</patch>")
            for _ in range(rows):
                ids += newline
                offsets += _starts(len(ids), cols, cell)
                ids += cell * cols
        return MediaTokens(ids, offsets)

    def video(self, frames: int) -> MediaTokens:
        """See MediaFormat."""
        frame = self._wrapped("<vid>", "<VID_CONTEXT>", "</vid>")
        return MediaTokens(frame * frames, _starts(0, frames, frame))

    def image_length(self, grid: tuple[int, int]) -> int:
        """See MediaFormat."""
        cols, rows = grid
        # Each tile has a tag before and after it; a newline may be several tokens.
        tile = self.image_token_length + 2
        if cols * rows == 1:
            return tile
        return tile + rows * len(self.tokenizer.encode("\n")) + cols * rows * tile

    def video_length(self, frames: int) -> int:
        """See MediaFormat."""
        return frames * (self.image_token_length + 2)


class InternVLFormat(MediaFormat):
    """Placeholder format of InternVL 2.5 and 3, as of transformers' processor: one tag around an
    image.

    Image: `<img>` cells row by row, thumbnail `</img>`. Video: `Frame1: <img>` frame `</img>`, a
    newline, `Frame2: ` and so on. In a content given as a list, a newline follows each medium.
    """

    special_tokens = ("<img>", "</img>", "<IMG_CONTEXT>")
    thumbnail_last = True
    video_opening = "Frame1: "

    def __init__(self, tokenizer: Tokenizer, *, image_token_length: int) -> None:
        super().__init__(tokenizer, image_token_length=image_token_length)
        self._labels: dict[int, list[int]] = {}

    @staticmethod
    def laid_out(parts: Sequence[TextPart | MediaPart]) -> list[TextPart | MediaPart]:
        """See MediaFormat."""
        spaced: list[TextPart | MediaPart] = []
        for part in parts:
            spaced.append(part)
            if isinstance(part, MediaPart):
                spaced.append(TextPart("\n"))
        return spaced

    def image(self, grid: tuple[int, int]) -> MediaTokens:
        """See MediaFormat."""
        tiles = _num_tiles(grid)
        offsets = [1 + tile * self.image_token_length for tile in range(tiles)]
        return MediaTokens(self._tiles(tiles), offsets)

    def video(self, frames: int) -> MediaTokens:
        """See MediaFormat."""
        ids: list[int] = []
        offsets = []
        for frame in range(frames):
            if frame:
                ids += self._label(frame)
            offsets.append(len(ids) + 1)
            ids += self._tiles(1)
        return MediaTokens(ids, offsets)

    def image_length(self, grid: tuple[int, int]) -> int:
        """See MediaFormat."""
        return 2 + self.image_token_length * _num_tiles(grid)

    def video_length(self, frames: int) -> int:
        """See MediaFormat."""
        labels = sum(len(self._label(frame)) for frame in range(1, frames))
        return frames * (self.image_token_length + 2) + labels

    def _tiles(self, tiles: int) -> list[int]:
        return self._wrapped("<img>", "<IMG_CONTEXT>", "</img>", tiles=tiles)

    def _label(self, frame: int) -> list[int]:
        """Ids of the text before frame number `frame`, counted from 0; the first frame has none."""
        # Kept, since lengths of the same frames are asked for with every video.
        if frame not in self._labels:
            self._labels[frame] = self.tokenizer.encode(f"\nFrame{frame + 1}: ")
        return self._labels[frame]


MEDIA_FORMATS: dict[str, type[MediaFormat]] = {
    "long_vita": LongVitaFormat,
    "internvl": InternVLFormat,
}


def _num_tiles(grid: tuple[int, int]) -> int:
    """Cells of a grid, and a thumbnail if there are several."""
    cells = grid[0] * grid[1]
    if cells > 1:
        return cells + 1
    return 1


def _starts(position: int, count: int, tile: Sequence[int]) -> list[int]:
    """Indices of the first placeholders of `count` consecutive tiles from `position`."""
    return [position + 1 + index * len(tile) for index in range(count)]
