"""Encoding of samples by a recipe: tokens, grids of images and frame times of videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_vita.config import MediaConfig, VisionConfig
from megatron_vita.data.samples.truncation import Piece, Truncated, truncate
from megatron_vita.media.normalization import Normalization
from megatron_vita.media.tiling import Grid, Tiling, choose_grid, grids_of, num_tiles
from megatron_vita.media.video import VideoInfo, frame_times, num_frames
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.media_tokens import MediaFormat
from megatron_vita.text.tokenizer_base import Tokenizer


class Medium(NamedTuple):
    """An image or video of a document, in file `member`.

    `grid` is None for a video; `times` (seconds) is empty for an image.
    """

    member: str
    num_tiles: int
    grid: Grid | None
    times: list[float]


class TileFormat(NamedTuple):
    """Settings for decoding media to tiles."""

    tiling: Tiling
    normalization: Normalization
    video_fit: str = "letterbox"

    @property
    def size(self) -> int:
        """Side of a tile in pixels."""
        return self.tiling.tile_size


@dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """Settings for encoding samples of a dataset to documents."""

    chat: ChatFormat
    media: MediaConfig
    vision: VisionConfig
    text_only: bool = False
    limit: int = 0  # tokens of a pack; 0 for none
    overlong: str = "reject"
    alignment: int = 1  # of the conversations of a pair

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the prompt format."""
        return self.chat.tokenizer

    @cached_property
    def placeholders(self) -> MediaFormat:
        """Placeholder format of media."""
        return self.chat.media(image_token_length=self.vision.image_token_length)

    def measure_image(self, size: tuple[int, int]) -> tuple[int, int]:
        """Number of tokens and tiles of an image of (width, height)."""
        grid = self._grid(size)
        return self.placeholders.image_length(grid), num_tiles(grid)

    def pixels_shown(self, size: tuple[int, int]) -> int:
        """Pixels of the tiles, the thumbnail apart, that show an image of (width, height)."""
        grid = self._grid(size)
        return grid.cols * grid.rows * self.vision.image_size**2

    def measure_video(self, info: VideoInfo) -> tuple[int, int]:
        """Number of tokens and frames of a video."""
        frames = num_frames(info, max_fps=self.media.max_fps, max_frames=self.media.max_frames)
        return self.video_tokens(frames), frames

    def video_tokens(self, frames: int) -> int:
        """Number of tokens of a video of `frames` frames."""
        return self.placeholders.video_length(frames)

    def image(
        self, member: str, size: tuple[int, int], *, tiles: int | None = None
    ) -> Medium | None:
        """Choose the grid of an image of (width, height); None if `tiles` is 0: it is left out."""
        grid = self._grid(size)
        if tiles == 0:
            return None
        return Medium(member, num_tiles(grid), grid, [])

    def video(self, member: str, info: VideoInfo, *, frames: int | None = None) -> Medium | None:
        """Choose the frame times of a video, at most `frames`; None if that is 0: left out."""
        most = frames
        if most is None:
            most = self.media.max_frames
        if most == 0:
            return None
        times = frame_times(info, max_fps=self.media.max_fps, max_frames=most)
        return Medium(member, len(times), None, list(times))

    def boundary[Tokens: (int, np.ndarray)](self, tokens: Tokens) -> Tokens:
        """Padding tokens after the chosen conversation of a pair, of `tokens` tokens."""
        return -tokens % self.alignment

    def truncate(self, pieces: Sequence[Piece]) -> Truncated | None:
        """Truncate a document longer than a pack by the recipe's policy; None if none remains."""
        return truncate(
            pieces, limit=self.limit, policy=self.overlong, video_tokens=self.video_tokens
        )

    def _grid(self, size: tuple[int, int]) -> Grid:
        return choose_grid(size, self.tiling)

    @cached_property
    def tiling(self) -> Tiling:
        """Tiling of images."""
        media = self.media
        listed = tuple(Grid(*map(int, grid.split("x"))) for grid in media.grids)
        grids = listed or grids_of(media.min_tiles, media.max_tiles)
        return Tiling(
            tile_size=self.vision.image_size,
            grids=grids,
            anyres=media.tiling == "anyres",
            thumbnail_last=self.placeholders.thumbnail_last,
        )

    @property
    def tile_format(self) -> TileFormat:
        """Settings for decoding media to tiles."""
        return TileFormat(self.tiling, self.media.normalization, self.media.video_fit)
