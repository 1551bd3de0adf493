"""Videos: probing, sampling of frame times, and decoding of the frames.

A video is a file of any format that FFmpeg reads, or a frame archive (`frame_archive.py`).
"""

import itertools
import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import av
import numpy as np

from megatron_vita.errors import DataError
from megatron_vita.media.clip import open_clip
from megatron_vita.media.files import File
from megatron_vita.media.frame_archive import FrameArchive, is_archive
from megatron_vita.media.images import Pixels, image_size
from megatron_vita.media.normalization import Normalization, mean_color
from megatron_vita.media.orientation import frame_orientation
from megatron_vita.media.picking import Picker, Take
from megatron_vita.media.resize import Color, letterboxed, squashed

logger = logging.getLogger(__name__)

Report = Callable[[int, str], None]
"""Callback (frames, reason) for frames of a video that are replaced because they are damaged."""


@dataclass(frozen=True)
class VideoInfo:
    """Metadata for sampling: `duration` in seconds, mean frames per second, and number of frames.

    `size`, not used for sampling, is the width and height of the frames by the file's header, for
    an archive those of its largest frame; (0, 0) if unknown.
    """

    duration: float
    fps: float
    frames: int
    size: tuple[int, int] = field(default=(0, 0), compare=False)


def probe_video(data: File, name: str) -> VideoInfo:
    """Measure a video by reading all its packets, without decoding.

    Raises:
        DataError: naming the video by `name`: it has no frame.
    """
    if is_archive(data):
        archive = _MeasuredArchive(data, name)
        return VideoInfo(len(archive) / archive.fps, archive.fps, len(archive), archive.size())
    with open_clip(data, name) as clip:
        # Packets are counted, since the header of a truncated file states frames that are missing.
        last = clip.read()
        frames = 0
        assert last is not None, "a clip has a packet"
        packets = itertools.chain([last], iter(clip.read, None))
        for coded in packets:
            frames += coded.is_shown
            if coded.is_shown and (coded.time > last.time or frames == 1):
                last = coded
        duration = last.time - clip.origin + clip.duration_of(last)
        frames = max(frames, 1)
        size = (clip.codec.width, clip.codec.height)
        rate = clip.rate
        if duration:
            rate = frames / duration
        return VideoInfo(duration, rate, frames, size)


class _MeasuredArchive(FrameArchive):
    """A frame archive that reads the sizes of its frames from their headers."""

    def size(self) -> tuple[int, int]:
        """Width and height of the frame with the most pixels; (0, 0) if no header can be read."""
        sizes = [self._size(member) for member in self._members]
        return max(sizes, key=math.prod)

    def _size(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        try:
            return image_size(self._archive.read(member), member.filename)
        except Exception:
            # Decoding replaces a frame that cannot be read, and so does not need its size.
            return (0, 0)


def frame_starts(data: File, name: str) -> list[float]:
    """Presentation times of all frames of a video file, ascending, in seconds from the first one.

    Raises:
        DataError: naming the video by `name`: it has no frame.
    """
    with open_clip(data, name) as clip:
        shown = (coded.time for coded in iter(clip.read, None) if coded.is_shown)
        return sorted({max(time - clip.origin, 0.0) for time in shown}) or [0.0]


def num_frames(info: VideoInfo, *, max_fps: float, max_frames: int) -> int:
    """Number of frames to sample: within `max_fps`, `max_frames` and the video, at least one."""
    # The margin counts durations that float rounding puts just below a whole number of frames.
    by_rate = int(info.duration * max_fps + 1e-6)
    return max(1, min(by_rate, max_frames, info.frames))


def frame_times(info: VideoInfo, *, max_fps: float, max_frames: int) -> list[float]:
    """Times to sample, in seconds from the first frame: the middles of `num_frames` equal parts.

    No moment of the video is thus farther from a sample than half a part. (Long-VITA steps from the
    first frame and leaves the end unsampled.)
    """
    frames = num_frames(info, max_fps=max_fps, max_frames=max_frames)
    return [(index + 0.5) * info.duration / frames for index in range(frames)]


def decode_frames(
    data: File,
    name: str,
    *,
    times: Sequence[float],
    tile_size: int,
    normalization: Normalization = "imagenet",
    fit: str = "letterbox",
    out: np.ndarray | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Decode the frames shown at `times` to uint8 `[len(times), 3, S, S]`.

    Each frame is turned upright and resized (bicubic). A frame that cannot be decoded is replaced
    by the one before (at the start, by the one after).

    Args:
        data: the video file.
        name: name of the video in errors and reports.
        times: ascending, in seconds from the first frame; only what these need is decoded.
        tile_size: side S of a tile in pixels.
        normalization: its mean colour pads letterboxed frames.
        fit: "letterbox" keeps the aspect ratio in the middle of the square, "squash" does not.
        out: array to write into; None allocates one.
        report: called with the number of replaced frames and a line about them; None logs it.

    Raises:
        DataError: naming the video by `name`: no frame can be decoded.
    """
    assert all(earlier <= later for earlier, later in itertools.pairwise(times)), (
        "times must ascend"
    )
    color = None
    if fit == "letterbox":
        color = mean_color(normalization)
    tiles = _Tiles(times, tile_size, color, out)
    if times and is_archive(data):
        stand_ins = FrameArchive(data, name).show(
            times, lambda index, pixels: tiles.show(index, pixels, before=index - 1)
        )
        if stand_ins:
            reason = f"{name}: {stand_ins} of {len(times)} frames cannot be read"
            (report or _log)(stand_ins, reason)
    elif times:
        _show_clip(data, name, tiles, report or _log)
    return tiles.out


def _log(stand_ins: int, reason: str) -> None:
    logger.warning("%s", reason)


def walk_frames(
    data: File, name: str, *, times: Sequence[float], take: Take, report: Report
) -> None:
    """Call `take(index, frame)` for the frame shown at each of `times`, as in `decode_frames`.

    All of the file is decoded once, in order.

    Raises:
        DataError: naming the video by `name`: no frame can be decoded.
    """
    with open_clip(data, name) as clip:
        moments = [clip.origin + time for time in times]
        picker = Picker(clip, moments, take, jump=False, skip=False)
        if len(picker.run()) < len(times):
            raise _undecodable(name, clip.num_read)
    if picker.lost:
        stand_ins = sum(map(picker.stands_in, range(len(times))))
        _report_lost(report, name, stand_ins=stand_ins, of=len(times), packets=len(picker.lost))


class _Tiles:
    """Array of tiles for `times`, filled one by one."""

    def __init__(
        self, times: Sequence[float], tile_size: int, color: Color | None, out: np.ndarray | None
    ) -> None:
        self.times = times
        if out is None:
            self.out = np.empty((len(times), 3, tile_size, tile_size), dtype=np.uint8)
        else:
            self.out = out
        self._box = (tile_size, tile_size)
        self._color = color

    def show(self, index: int, pixels: Pixels | None, *, before: int) -> None:
        """Draw tile `index`; None as pixels copies tile `before`."""
        if pixels is None:
            self.out[index] = self.out[before]
        elif self._color is None:
            self.out[index] = squashed(pixels, self._box)
        else:
            self.out[index] = letterboxed(pixels, self._box, self._color)


def _show_clip(data: File, name: str, tiles: _Tiles, report: Report) -> None:
    """Draw the frame of each time, in up to three passes of decreasing speed."""
    # Seeks and skipped frames may miss the right frame of a damaged video: moments without an exact
    # frame are decoded again with fewer shortcuts, the last pass without any.
    left = list(range(len(tiles.times)))
    lost: set[float] = set()
    stand_ins = 0
    for jump, skip in ((True, True), (True, False), (False, False)):
        with open_clip(data, name) as clip:
            moments = [clip.origin + tiles.times[index] for index in left]
            picker = Picker(clip, moments, _drawn(tiles, left, name), jump=jump, skip=skip)
            picked = picker.run()
        lost |= picker.lost
        good = [pick.is_exact or (pick.is_covered and not skip) or not jump for pick in picked]
        stand_ins += sum(picker.stands_in(i) for i, is_good in enumerate(good) if is_good)
        left = [index for index, is_good in itertools.zip_longest(left, good) if not is_good]
        if not left:
            break
    if left:
        raise _undecodable(name, clip.num_read)
    if lost:
        of = len(tiles.times)
        _report_lost(report, name, stand_ins=stand_ins, of=of, packets=len(lost))


def _report_lost(report: Report, name: str, *, stand_ins: int, of: int, packets: int) -> None:
    """Report packets that cannot be decoded; only log them if all wanted frames are intact."""
    reason = (
        f"{name}: {packets} packets cannot be decoded, {stand_ins} of {of} frames that are shown"
    )
    if stand_ins:
        report(stand_ins, reason)
    else:
        _log(stand_ins, reason)


def _undecodable(name: str, packets: int) -> DataError:
    return DataError(f"{name}: none of the {packets} packets of this video can be decoded")


def _drawn(tiles: _Tiles, indices: list[int], name: str) -> Take:
    """Callback that draws the frame of moment number i as tile `indices[i]`."""

    def take(number: int, frame: av.VideoFrame | None) -> None:
        pixels = None
        if frame is not None:
            pixels = frame_pixels(frame, name)
        tiles.show(indices[number], pixels, before=indices[max(number - 1, 0)])

    return take


def frame_pixels(frame: av.VideoFrame, name: str) -> Pixels:
    """Convert a decoded frame to pixels with an orientation.

    Raises:
        DataError: naming the video by `name`: it is turned by an angle that is no multiple of 90.
    """
    try:
        return Pixels(frame.to_ndarray(format="rgb24"), frame_orientation(frame))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
