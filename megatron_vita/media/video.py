"""Video files of any kind that FFmpeg reads: what they hold, which moments to look at, and the frames there."""

import bisect
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image

from megatron_vita.errors import DataError
from megatron_vita.media.normalize import mean_color

logger = logging.getLogger(__name__)

_TOLERANCE = 5e-4
"""Seconds by which a container's clock (often of milliseconds) may round the time of a frame."""


@dataclass(frozen=True)
class VideoInfo:
    """What sampling needs to know: `duration` in seconds, mean frames per second, and the number of frames."""

    duration: float
    fps: float
    frames: int


def probe_video(data: bytes, name: str) -> VideoInfo:
    """Counts the compressed frames, which a truncated file's header would not tell; none is decoded.

    Raises DataError, which names the video by `name`, if there are none.
    """
    with _opened(data, name) as stream:
        clip = _Clip(stream, name)
        shown = [index for index, packet in enumerate(clip.packets) if not packet.is_discard] or [0]
        last = max(shown, key=clip.times.__getitem__)
        duration = clip.times[last] - clip.origin + clip.packet_duration(last)
        return VideoInfo(duration, len(shown) / duration if duration else clip.rate, len(shown))


def num_frames(info: VideoInfo, *, max_fps: float, max_frames: int) -> int:
    """Frames to take: as many as `max_fps`, `max_frames` and the video allow, and at least one."""
    by_rate = int(info.duration * max_fps + 1e-6)
    return max(1, min(by_rate, max_frames, info.frames))


def frame_times(info: VideoInfo, *, max_fps: float, max_frames: int) -> list[float]:
    """Moments to look at, in seconds from the first frame: the middles of `num_frames` equal parts of the video.

    So no moment of it is farther from a sampled one than half a part. (Long-VITA steps from the first frame and leaves
    the end unsampled.)
    """
    frames = num_frames(info, max_fps=max_fps, max_frames=max_frames)
    return [(index + 0.5) * info.duration / frames for index in range(frames)]


def decode_frames(
    data: bytes, name: str, *, times: Sequence[float], tile_size: int, normalization: str = "imagenet"
) -> np.ndarray:
    """The frames shown at `times` (ascending, in seconds from the first frame) as uint8 `[len(times), 3, S, S]`.

    Each is turned upright, padded to a square with the mean colour of `normalization` and resized, bicubic. Packets
    that cannot be decoded are passed over: the frame before (at the start, the one after) stands for what they held.
    Only the parts that `times` touch are decoded, each from its key frame on.

    Raises DataError, which names the video by `name`, if no frame can be decoded.
    """
    assert all(earlier <= later for earlier, later in itertools.pairwise(times)), "times must ascend"
    color = mean_color(normalization)
    if not times:
        return np.zeros((0, 3, tile_size, tile_size), dtype=np.uint8)
    with _opened(data, name) as stream:
        clip = _Clip(stream, name)
        moments = [clip.origin + time for time in times]
        starts = [clip.keyframe_before(moment) for moment in moments]
        sampler = _Sampler(moments, tile_size, color)
        clip.play(sampler, starts)
        if not sampler.covers([clip.times[start] for start in starts]):
            sampler = _Sampler(moments, tile_size, color)
            clip.play(sampler, [0] * len(moments))  # a key frame is damaged: an earlier part may show more
    if not sampler.done:
        raise DataError(f"{name}: none of the {len(clip.packets)} packets of this video can be decoded")
    return sampler.tiles


class _Sampler:
    """Picks the frames shown at `moments` out of frames that are offered in the order in which they are shown."""

    def __init__(self, moments: list[float], tile_size: int, color: tuple[int, int, int]) -> None:
        self.moments = moments
        self.tiles = np.zeros((len(moments), 3, tile_size, tile_size), dtype=np.uint8)
        self.times: list[float] = []
        self._color = color
        self._last: tuple[float, av.VideoFrame] | None = None

    @property
    def done(self) -> bool:
        return len(self.times) == len(self.moments)

    def offer(self, time: float, frame: av.VideoFrame) -> None:
        while not self.done and time > self.moments[len(self.times)] + _TOLERANCE:
            self._take(*(self._last or (time, frame)))
        self._last = (time, frame)

    def finish(self) -> None:
        while self._last and not self.done:
            self._take(*self._last)

    def covers(self, starts: list[float]) -> bool:
        """Whether each moment has a frame that is neither later than it nor earlier than its `starts`."""
        return self.done and all(
            start - _TOLERANCE <= time <= moment + _TOLERANCE
            for start, time, moment in zip(starts, self.times, self.moments, strict=True)
        )

    def _take(self, time: float, frame: av.VideoFrame) -> None:
        place = len(self.times)
        if place and self.times[-1] == time:
            self.tiles[place] = self.tiles[place - 1]
        else:
            self.tiles[place] = _letterboxed(frame, self.tiles.shape[-1], self._color)
        self.times.append(time)


class _Clip:
    """The packets of a video stream and when their frames are shown, in seconds of the container's clock."""

    def __init__(self, stream: av.VideoStream, name: str) -> None:
        self.name = name
        self.packets = list(_packets(stream))
        if not self.packets:
            raise DataError(f"{name}: this video holds no frame")
        self.rate = float(stream.average_rate or 0)
        self._codec = stream.codec_context
        self._unit = float(stream.time_base or 0)
        stamps = [packet.dts if packet.pts is None else packet.pts for packet in self.packets]
        known = [stamp * self._unit for stamp in stamps if stamp is not None]
        timeless = len(known) < len(stamps)
        # Where a container has no times (raw streams), or those of decoding only (AVI), frames are counted.
        self._counts = timeless or (self._codec.has_b_frames and known == sorted(known))
        self.times = [index / (self.rate or 25) for index in range(len(stamps))] if timeless else known
        self.origin = min(
            (time for time, packet in zip(self.times, self.packets, strict=True) if not packet.is_discard),
            default=self.times[0],
        )
        keyframes = [index for index, packet in enumerate(self.packets) if packet.is_keyframe]
        self._keyframes = sorted(keyframes, key=self.times.__getitem__)

    def packet_duration(self, index: int) -> float:
        """Seconds for which the frame of a packet is shown; 0 if nothing tells."""
        return (self.packets[index].duration or 0) * self._unit or (1 / self.rate if self.rate else 0.0)

    def keyframe_before(self, moment: float) -> int:
        """Index of the packet at which decoding must start to show what is seen at `moment`."""
        place = bisect.bisect_right(self._keyframes, moment + _TOLERANCE, key=self.times.__getitem__)
        return self._keyframes[place - 1] if place else 0

    def play(self, sampler: _Sampler, starts: list[int]) -> None:
        """Offers frames until the sampler is done, jumping to `starts[i]` where only moments i and later are left."""
        self._codec.flush_buffers()
        index, failed = starts[0], 0
        first, shown = index, 0
        while index <= len(self.packets) and not sampler.done:
            try:
                frames = self._codec.decode(self.packets[index] if index < len(self.packets) else None)
            except av.FFmpegError:
                frames, failed = [], failed + 1
            for frame in frames:
                sampler.offer(self._frame_time(frame, first + shown), frame)
                shown += 1
            index += 1
            if not sampler.done and starts[len(sampler.times)] > index:
                index = first = starts[len(sampler.times)]
                shown = 0
                self._codec.flush_buffers()
        sampler.finish()
        if failed:
            logger.warning("%s: %d of %d packets cannot be decoded", self.name, failed, len(self.packets))

    def _frame_time(self, frame: av.VideoFrame, place: int) -> float:
        if self._counts or frame.pts is None:
            return self.times[min(place, len(self.times) - 1)]
        return frame.pts * self._unit


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[av.VideoStream]:
    """The first video stream of a file, cover pictures apart, to be decoded in one thread."""
    try:
        with av.open(io.BytesIO(data)) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = [stream.type for stream in container.streams]
                raise DataError(f"{name}: no video stream among {kinds} in these {len(data)} bytes")
            streams[0].codec_context.thread_count = 1
            yield streams[0]
    except av.FFmpegError as error:
        raise DataError(f"{name}: cannot read this video of {len(data)} bytes: {error}") from error


def _packets(stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets in the order of the file, up to its end or to where it cannot be read on."""
    container = cast(InputContainer, stream.container)
    try:
        yield from (packet for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        logger.warning("%s", error)


def _letterboxed(frame: av.VideoFrame, tile_size: int, color: tuple[int, int, int]) -> np.ndarray:
    """uint8 `[3, S, S]`."""
    image = frame.to_image().rotate(frame.rotation, expand=True)
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((tile_size, tile_size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
