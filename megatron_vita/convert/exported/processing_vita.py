"""Prompts and pixels of a vision-language model that megatron_vita has exported.

Images are cut into tiles and a thumbnail, frames of videos are tiles of their own. Token ids and
pixels are those that the model was trained with.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .media_vita import FrameSampling, frames_of, images_of, videos_of

_TAG = re.compile("<(image|video|IMG_CONTEXT)>")  # as chat templates write the place of a medium
_TEXT_OPTIONS = (
    *("add_special_tokens", "padding", "padding_side", "pad_to_multiple_of", "max_length"),
    *("truncation", "stride", "return_tensors", "return_token_type_ids", "return_attention_mask"),
    *("return_special_tokens_mask", "return_offsets_mapping", "return_length"),
    *("return_overflowing_tokens", "sanitize_control_tokens", "verbose"),
)
_VIDEO_OPTIONS = ("fps", "num_frames", "do_sample_frames")
_LARGE_REDUCTION = 2.0  # beyond it Pillow's and torch's filters give the same pixels


class VitaProcessor(ProcessorMixin):
    """Tokenizer, and preprocessing of images and videos.

    Args:
        tokenizer: the tokenizer.
        tile_size: side of a tile in pixels.
        image_seq_length: placeholder tokens of a tile.
        tiling: "dynamic" squashes an image to the grid of the nearest aspect ratio; "anyres" keeps
            its aspect ratio, on black.
        grids: allowed grids as [columns, rows]; empty: all of `min_tiles` to `max_tiles` tiles.
        min_tiles: smallest number of tiles of a grid.
        max_tiles: largest number of tiles of a grid.
        max_fps: largest number of frames that are taken of a second of video.
        max_frames: largest number of frames that are taken of a video.
        video_fit: "letterbox" keeps the aspect ratio of frames, on the mean color; "squash" does
            not.
        image_mean: mean of red, green and blue, on a scale of 0 to 1.
        image_std: their standard deviations.
        chat_template: Jinja template of prompts.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        tile_size: int = 448,
        image_seq_length: int = 256,
        tiling: str = "dynamic",
        grids: Sequence[Sequence[int]] = (),
        min_tiles: int = 1,
        max_tiles: int = 12,
        max_fps: float = 1.0,
        max_frames: int = 128,
        video_fit: str = "letterbox",
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.tile_size = tile_size
        self.image_seq_length = image_seq_length
        self.tiling = tiling
        self.grids = [list(grid) for grid in grids]
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.max_fps = max_fps
        self.max_frames = max_frames
        self.video_fit = video_fit
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` returns."""
        return [*self.tokenizer.model_input_names, "pixel_values"]

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **options: Any
    ) -> BatchFeature:
        """Convert prompts with `<image>` and `<video>` tags to token ids and tiles.

        Args:
            images: images in the order of their tags: PIL images, arrays [height, width, 3], paths,
                addresses, files in base64; lists of them may be nested.
            text: one prompt or several, as `apply_chat_template` writes them.
            videos: videos in the order of their tags: paths, or frames (an array [frames, height,
                width, 3], a list of PIL images or of arrays), of which all are taken.
            options: of the tokenizer, also as `text_kwargs`; `fps` and `num_frames`, also in
                `videos_kwargs`, replace `max_fps` and `max_frames` for video files.

        Returns:
            `input_ids`, `attention_mask`, and with media `pixel_values` [tiles, 3, S, S].

        Raises:
            ValueError: tags and media do not go together, a medium cannot be read, or an option is
                unknown.
        """
        if text is None:
            raise ValueError("text is needed, with an <image> or <video> tag for each medium")
        _refuse_audio(options.pop("audio", None))
        sampling = self._sampling(options)
        with_offsets = options.pop("return_text_replacement_offsets", False)
        settings = _text_settings(options)
        media = _Media(images=images_of(images), videos=videos_of(videos))
        prompts = [text] if isinstance(text, str) else list(text)
        expanded = [self._expanded(prompt, media, sampling) for prompt in prompts]
        _check_used(media)
        encoded = dict(self.tokenizer([prompt.text for prompt in expanded], **settings))
        if with_offsets:
            encoded["text_replacement_offsets"] = [prompt.offsets for prompt in expanded]
        tiles = [each for prompt in expanded for each in prompt.tiles]
        if tiles:
            encoded["pixel_values"] = self._normalized(torch.cat(tiles))
        return BatchFeature(encoded)

    def _sampling(self, options: dict[str, Any]) -> FrameSampling:
        """Take the sampling of frames out of the options of a call."""
        _refuse_unknown(options.pop("images_kwargs", None) or {}, (), where="images_kwargs")
        given = dict(options.pop("videos_kwargs", None) or {})
        _refuse_unknown(given, _VIDEO_OPTIONS, where="videos_kwargs")
        given |= {name: options.pop(name) for name in _VIDEO_OPTIONS if name in options}
        wanted = given.pop("do_sample_frames", None)
        rates = {name: value for name, value in given.items() if value is not None}
        for name, value in rates.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: a number above 0 is needed")
        return FrameSampling(
            max_fps=rates.get("fps", self.max_fps),
            max_frames=rates.get("num_frames", self.max_frames),
            wanted=True if wanted is None and rates else wanted,
        )

    def _expanded(self, prompt: str, media: "_Media", sampling: FrameSampling) -> "_Expanded":
        """Replace the tags of a prompt by the placeholders of their media."""
        text = ""
        tiles = []
        offsets = []
        end = 0
        for tag in _TAG.finditer(prompt):
            kind = "video" if tag.group(1) == "video" else "image"
            written, pixels = self._medium(kind, media, sampling)
            text += prompt[end : tag.start()] + written
            end = tag.end()
            tiles.append(pixels)
            new_span = (len(text) - len(written), len(text))
            found = {"type": kind, "text": tag.group(), "replacement": written}
            offsets.append(found | {"span": tag.span(), "new_span": new_span})
        return _Expanded(text + prompt[end:], tiles, offsets)

    def _medium(self, kind: str, media: "_Media", sampling: FrameSampling) -> tuple[str, Tensor]:
        """Take the next image or video: its placeholders, and its tiles in uint8."""
        if kind == "image":
            grid, pixels = self._image_tiles(_next(media.images, kind))
            return self._image_text(*grid), pixels
        frames = frames_of(_next(media.videos, kind), sampling)
        tiles = torch.stack([self._frame_tile(frame) for frame in frames])
        return self._tagged("vid", "VID_CONTEXT") * len(frames), tiles

    def _image_text(self, columns: int, rows: int) -> str:
        """Write placeholders of an image: its thumbnail, then each row of tiles on a line."""
        thumbnail = self._tagged("img", "IMG_CONTEXT")
        if columns * rows == 1:
            return thumbnail
        return thumbnail + ("\n" + self._tagged("patch", "PATCH_CONTEXT") * columns) * rows

    def _tagged(self, tag: str, placeholder: str) -> str:
        return f"<{tag}>" + f"<{placeholder}>" * self.image_seq_length + f"</{tag}>"

    def _image_tiles(self, image: np.ndarray) -> tuple[tuple[int, int], Tensor]:
        """Choose the grid of an image, and cut it into a thumbnail and tiles, uint8."""
        height, width = image.shape[:2]
        side = self.tile_size
        columns, rows = self._grid(width, height)
        thumbnail = _squashed(image, side, side)[None]
        if columns * rows == 1:
            return (columns, rows), thumbnail
        if self.tiling == "anyres":
            canvas = _letterboxed(image, columns * side, rows * side, color=(0, 0, 0))
        else:
            canvas = _squashed(image, columns * side, rows * side)
        cells = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        return (columns, rows), torch.cat([thumbnail, cells.reshape(-1, 3, side, side)])

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        grids = [(columns, rows) for columns, rows in self.grids]
        if not grids:
            sides = range(1, self.max_tiles + 1)
            grids = [
                (columns, rows)
                for columns, rows in itertools.product(sides, sides)
                if self.min_tiles <= columns * rows <= self.max_tiles
            ]
            grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
        if self.tiling == "anyres":
            return _roomiest_grid(grids, width, height, side=self.tile_size)
        return _nearest_grid(grids, width, height, side=self.tile_size)

    def _frame_tile(self, frame: np.ndarray) -> Tensor:
        if self.video_fit == "squash":
            return _squashed(frame, self.tile_size, self.tile_size)
        color = [min(max(int(value * 255), 0), 255) for value in self.image_mean]
        return _letterboxed(frame, self.tile_size, self.tile_size, color=color)

    def _normalized(self, tiles: Tensor) -> Tensor:
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        deviation = torch.tensor(self.image_std).view(3, 1, 1)
        return (tiles.to(torch.float32) / 255 - mean) / deviation


class _Media(NamedTuple):
    """Images [height, width, 3] and videos that are still to be put in the place of a tag."""

    images: Iterator[np.ndarray]
    videos: Iterator[Any]


class _Expanded(NamedTuple):
    """Prompt with placeholders, tiles of its media, and where tags were replaced."""

    text: str
    tiles: list[Tensor]
    offsets: list[dict[str, Any]]  # as transformers' `get_text_with_replacements` describes them


def _text_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Join the tokenizer's options of a call with ours."""
    nested = options.pop("text_kwargs", None) or {}
    _refuse_unknown(nested, _TEXT_OPTIONS, where="text_kwargs")
    _refuse_unknown(options, _TEXT_OPTIONS, where="the processor")
    # A chat template has written the tokens that begin a prompt. Answers follow at the right.
    return {"add_special_tokens": False, "padding_side": "left"} | nested | options


def _refuse_unknown(given: Iterable[str], known: Sequence[str], *, where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: {where} has no such option. Options of the tokenizer, "
            f"{', '.join(_VIDEO_OPTIONS)} are taken; others are attributes of the processor, for "
            "example processor.max_tiles"
        )


def _refuse_audio(audio: Any) -> None:
    if audio is not None:
        raise ValueError("audio is given, but the model takes text, images and videos")


def _next(media: Iterator[Any], kind: str) -> Any:
    for medium in media:
        return medium
    raise ValueError(f"the text has more <{kind}> tags than {kind}s are given")


def _check_used(media: _Media) -> None:
    for kind, left in (("image", media.images), ("video", media.videos)):
        unused = sum(1 for _ in left)
        if unused:
            raise ValueError(f"{unused} {kind}s are given for which the text has no <{kind}> tag")


def _nearest_grid(
    grids: Sequence[tuple[int, int]], width: int, height: int, *, side: int
) -> tuple[int, int]:
    """Choose the grid of the nearest aspect ratio; of equally near ones a larger one if the image
    has more than half of its pixels."""
    best = grids[0]
    nearest = math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        half_full = width * height > 0.5 * side**2 * columns * rows
        if distance < nearest or (distance == nearest and half_full):
            best = (columns, rows)
            nearest = distance
    return best


def _roomiest_grid(
    grids: Sequence[tuple[int, int]], width: int, height: int, *, side: int
) -> tuple[int, int]:
    """Choose the grid that keeps most of the image's pixels, of those the one least empty."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        wide = grid[0] * side
        high = grid[1] * side
        scale = min(wide / width, high / height)
        scaled = max(1, int(width * scale)) * max(1, int(height * scale))
        shown = min(scaled, width * height)
        return shown, shown - wide * high

    return max(grids, key=merit)


def _letterboxed(pixels: np.ndarray, width: int, height: int, *, color: Sequence[int]) -> Tensor:
    """Fit an image into the middle of a canvas of one color: uint8 [3, height, width]."""
    wide = width / pixels.shape[1]
    high = height / pixels.shape[0]
    inner = (min(math.ceil(pixels.shape[1] * high), width), height)
    if wide < high:
        inner = (width, min(math.ceil(pixels.shape[0] * wide), height))
    canvas = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
    left = (width - inner[0]) // 2
    top = (height - inner[1]) // 2
    canvas[:, top : top + inner[1], left : left + inner[0]] = _squashed(pixels, *inner)
    return canvas


def _squashed(pixels: np.ndarray, width: int, height: int) -> Tensor:
    """Resize uint8 [h, w, 3] by the antialiased bicubic filter to uint8 [3, height, width].

    Each axis is resized in a pass whose result has 8 bits, in Pillow's order. The first pass of a
    small reduction is Pillow's own, as in training.
    """
    high, wide = pixels.shape[:2]
    between = (width, high)
    if high > height and high - height > 2 * (wide - width):
        between = (wide, height)
    if min(wide / width, high / height) < _LARGE_REDUCTION:
        pixels = np.array(Image.fromarray(pixels).resize(between, Image.Resampling.BICUBIC))
    planes = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    for size in (between[::-1], (height, width)):
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
    return planes[0].contiguous()
