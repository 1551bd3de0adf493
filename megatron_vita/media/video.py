"""Videos: what they hold, which moments to look at, and the frames there.

A video is a file of any kind that FFmpeg reads, or an archive of pictures (`frame_archive.py`).
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
from megatron_vita.media.normalize import Normalization, mean_color
from megatron_vita.media.orientation import frame_orientation
from megatron_vita.media.picking import Picker, Take
from megatron_vita.media.resize import Color, letterboxed, squashed

logger = logging.getLogger(__name__)

Report = Callable[[int, str], None]
"""Told how many frames of a video are shown by others because they are damaged, and a line on it."""


@dataclass(frozen=True)
class VideoInfo:
    """What sampling needs to know: `duration` in seconds, mean frames per second, and the number of
    frames.

    `size`, which sampling does not need, is the width and height of the frames by the file's head,
    of an archive those of its largest frame by that frame's head; 0 where none is known.
    """

    duration: float
    fps: float
    frames: int
    size: tuple[int, int] = field(default=(0, 0), compare=False)


def probe_video(data: File, name: str) -> VideoInfo:
    """Counts the compressed frames, which a truncated file's header would not tell; none is
    decoded.

    Raises DataError, which names the video by `name`, if there are none.
    """
    if is_archive(data):
        archive = _MeasuredArchive(data, name)
        return VideoInfo(len(archive) / archive.fps, archive.fps, len(archive), archive.size())
    with open_clip(data, name) as clip:
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
        return VideoInfo(duration, frames / duration if duration else clip.rate, frames, size)


class _MeasuredArchive(FrameArchive):
    """An archive whose frames are measured by their headers."""

    def size(self) -> tuple[int, int]:
        """Width and height of the frame with the most pixels, 0 where no header can be read."""
        sizes = [self._size(member) for member in self._members]
        return max(sizes, key=math.prod)

    def _size(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        try:
            return image_size(self._archive.read(member), member.filename)
        except Exception:  # as where frames are decoded, which passes over this one
            return (0, 0)


def frame_starts(data: File, name: str) -> list[float]:
    """The moments at which the frames of a video file begin to be shown, ascending, in seconds from
    the first one.

    Raises DataError, which names the video by `name`, if it holds none.
    """
    with open_clip(data, name) as clip:
        shown = (coded.time for coded in iter(clip.read, None) if coded.is_shown)
        return sorted({max(time - clip.origin, 0.0) for time in shown}) or [0.0]


def num_frames(info: VideoInfo, *, max_fps: float, max_frames: int) -> int:
    """Frames to take: as many as `max_fps`, `max_frames` and the video allow, and at least one."""
    by_rate = int(info.duration * max_fps + 1e-6)
    return max(1, min(by_rate, max_frames, info.frames))


def frame_times(info: VideoInfo, *, max_fps: float, max_frames: int) -> list[float]:
    """Moments to look at, in seconds from the first frame: the middles of `num_frames` equal parts
    of the video.

    So no moment of it is farther from a sampled one than half a part. (Long-VITA steps from the
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
    """The frames shown at `times` (ascending, in seconds from the first frame) as uint8
    `[len(times), 3, S, S]`.

    They are written into `out`, if given. Each is turned upright and resized (bicubic): with `fit`
    "letterbox" it is as large as it fits in the middle of a square of the mean colour of
    `normalization`, with "squash" it is the square. What cannot be decoded is passed over: the
    frame before (at the start, the one after) stands for it, and `report` is told (without one, the
    log). Only what `times` need is decoded.

    Raises DataError, which names the video by `name`, if no frame can be decoded.
    """
    assert all(earlier <= later for earlier, later in itertools.pairwise(times)), (
        "times must ascend"
    )
    color = mean_color(normalization) if fit == "letterbox" else None
    tiles = _Tiles(times, tile_size, color, out)
    if times and is_archive(data):
        stand_ins = FrameArchive(data, name).show(
            times, lambda place, pixels: tiles.show(place, pixels, before=place - 1)
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
    """Hand on the frame of a video file that is shown at each of `times` (as in `decode_frames`).

    All of the file is decoded once, in order.

    Raises DataError, which names the video by `name`, if no frame can be decoded.
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
    """The tiles of `times`, to be filled one by one."""

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

    def show(self, place: int, pixels: Pixels | None, *, before: int) -> None:
        """Draws tile `place`; without pixels it is that of place `before`."""
        if pixels is None:
            self.out[place] = self.out[before]
        elif self._color is None:
            self.out[place] = squashed(pixels, self._box)
        else:
            self.out[place] = letterboxed(pixels, self._box, self._color)


def _show_clip(data: File, name: str, tiles: _Tiles, report: Report) -> None:
    """Draws the frame of each time. What one pass does not surely find, is looked for with less
    haste."""
    left = list(range(len(tiles.times)))
    lost: set[float] = set()
    stand_ins = 0
    for jump, skip in ((True, True), (True, False), (False, False)):
        with open_clip(data, name) as clip:
            moments = [clip.origin + tiles.times[place] for place in left]
            picker = Picker(clip, moments, _drawn(tiles, left, name), jump=jump, skip=skip)
            picked = picker.run()
        lost |= picker.lost
        good = [pick.is_exact or (pick.is_covered and not skip) or not jump for pick in picked]
        stand_ins += sum(picker.stands_in(i) for i, is_good in enumerate(good) if is_good)
        left = [place for place, is_good in itertools.zip_longest(left, good) if not is_good]
        if not left:
            break
    if left:
        raise _undecodable(name, clip.num_read)
    if lost:
        of = len(tiles.times)
        _report_lost(report, name, stand_ins=stand_ins, of=of, packets=len(lost))


def _report_lost(report: Report, name: str, *, stand_ins: int, of: int, packets: int) -> None:
    """Tell of packets that cannot be decoded: the log alone where no frame that is wanted is."""
    reason = (
        f"{name}: {packets} packets cannot be decoded, {stand_ins} of {of} frames that are shown"
    )
    (report if stand_ins else _log)(stand_ins, reason)


def _undecodable(name: str, packets: int) -> DataError:
    return DataError(f"{name}: none of the {packets} packets of this video can be decoded")


def _drawn(tiles: _Tiles, places: list[int], name: str) -> Take:
    """Draws what is taken for moment number i as tile `places[i]`."""

    def take(number: int, frame: av.VideoFrame | None) -> None:
        tiles.show(
            places[number],
            None if frame is None else frame_pixels(frame, name),
            before=places[max(number - 1, 0)],
        )

    return take


def frame_pixels(frame: av.VideoFrame, name: str) -> Pixels:
    """A decoded frame and its orientation. DataError, by `name`, if it is turned by odd angles."""
    try:
        return Pixels(frame.to_ndarray(format="rgb24"), frame_orientation(frame))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
