"""Prompts and pixels of a vision-language model that megatron_vita has exported.

Images are cut into tiles and a thumbnail, frames of videos are tiles of their own. Token ids and
pixels are those that the model was trained with.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

_TAG = re.compile("<(image|video|IMG_CONTEXT)>")  # as chat templates write the place of a medium
_TOLERANCE = 5e-4  # seconds by which a container's clock may round the time of a frame
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
                addresses; lists of them may be nested.
            text: one prompt or several, as `apply_chat_template` writes them.
            videos: videos in the order of their tags: paths, or frames (an array [frames, height,
                width, 3], a list of PIL images or of arrays), of which all are taken.
            options: of the tokenizer, also as `text_kwargs`; `fps` and `num_frames` replace
                `max_fps` and `max_frames`.

        Returns:
            `input_ids`, `attention_mask`, and with media `pixel_values` [tiles, 3, S, S].

        Raises:
            ValueError: tags and media do not go together, or a medium cannot be read.
        """
        if text is None:
            raise ValueError("text is needed, with an <image> or <video> tag for each medium")
        media = _Media(images=_images_of(images), videos=_videos_of(videos))
        max_fps = options.pop("fps", None) or self.max_fps
        max_frames = options.pop("num_frames", None) or self.max_frames
        _refuse_audio(options.pop("audio", None))
        for unused in ("do_sample_frames", "images_kwargs", "videos_kwargs"):
            options.pop(unused, None)
        tiles: list[Tensor] = []

        def expanded(tag: re.Match[str]) -> str:
            if tag.group(1) != "video":
                grid, pixels = self._image_tiles(_next(media.images, "image"))
                tiles.append(pixels)
                return self._image_text(*grid)
            video = _next(media.videos, "video")
            frames = _frames_of(video, max_fps=max_fps, max_frames=max_frames)
            tiles.append(torch.stack([self._frame_tile(frame) for frame in frames]))
            return self._tagged("vid", "VID_CONTEXT") * len(frames)

        prompts = [text] if isinstance(text, str) else list(text)
        prompts = [_TAG.sub(expanded, prompt) for prompt in prompts]
        _check_used(media)
        # A chat template has written the tokens that begin a prompt. Answers follow at the right.
        usual = {"add_special_tokens": False, "padding_side": "left"}
        settings = usual | options.pop("text_kwargs", {}) | options
        encoded = dict(self.tokenizer(prompts, **settings))
        if tiles:
            encoded["pixel_values"] = self._normalized(torch.cat(tiles))
        return BatchFeature(encoded)

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


def _images_of(given: Any) -> Iterator[np.ndarray]:
    """Read the images of a nested list, one when it is asked for."""
    if given is None:
        return
    if isinstance(given, list | tuple):
        for item in given:
            yield from _images_of(item)
    else:
        yield _read_image(given)


def _read_image(given: Any) -> np.ndarray:
    """Read an image as uint8 [height, width, 3], upright, transparent parts over white."""
    image = given
    if isinstance(given, str | os.PathLike) and os.path.isfile(given):
        image = Image.open(given)
    elif isinstance(given, str):
        image = load_image(given)
    elif not isinstance(given, Image.Image):
        image = Image.fromarray(np.asarray(given))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"an image of mode {image.mode} is given: convert it to 8 bits first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _videos_of(given: Any) -> Iterator[Any]:
    """List the videos of a nested list."""
    if given is None:
        return
    if isinstance(given, list | tuple) and not _is_frame(given[:1]):
        for item in given:
            yield from _videos_of(item)
    else:
        yield given


def _is_frame(first: Sequence[Any]) -> bool:
    """Return true if a list begins with one frame, and so is a video."""
    return any(isinstance(item, Image.Image) or getattr(item, "ndim", 0) == 3 for item in first)


def _frames_of(video: Any, *, max_fps: float, max_frames: int) -> list[np.ndarray]:
    """Read the frames of a video, each uint8 [height, width, 3]; those of a file are sampled."""
    if isinstance(video, str | os.PathLike):
        return _sampled(os.fspath(video), max_fps=max_fps, max_frames=max_frames)
    return [_read_image(frame) for frame in video]


def _sampled(path: str, *, max_fps: float, max_frames: int) -> list[np.ndarray]:
    """Decode the frames that a file shows in the middles of equal parts."""
    if av is None:
        raise ValueError(f"{path}: PyAV reads video files: install av, or give frames")
    starts, duration = _frame_starts(path)
    number = max(1, min(int(duration * max_fps + 1e-6), max_frames, len(starts)))
    times = [(index + 0.5) * duration / number for index in range(number)]
    places = np.searchsorted(np.array(starts), np.array(times) + _TOLERANCE, side="right") - 1
    wanted = {int(place) for place in places}
    kept: dict[int, np.ndarray] = {}
    with av.open(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                pixels = frame.to_ndarray(format="rgb24")
                kept[index] = np.rot90(pixels, k=round(frame.rotation / 90))
            if len(kept) == len(wanted):
                break
    if len(kept) < len(wanted):
        raise ValueError(f"{path}: {len(kept)} of {len(wanted)} frames can be decoded")
    return [kept[int(place)] for place in places]


def _frame_starts(path: str) -> tuple[list[float], float]:
    """Read times of all frames in seconds from the first, ascending, and the video's duration."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        unit = float(stream.time_base or 0)
        packets = [
            (packet.pts, packet.duration)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        rate = float(stream.average_rate or 25)
    known = sorted((pts, duration or 0) for pts, duration in packets if pts is not None)
    if not known or len(known) < len(packets):
        raise ValueError(f"{path}: has no frames with times: give frames instead")
    starts = [(pts - known[0][0]) * unit for pts, _ in known]
    return starts, starts[-1] + (known[-1][1] * unit or 1 / rate)


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
