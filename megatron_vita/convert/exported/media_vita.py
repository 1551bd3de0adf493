"""Reading of images and videos from what callers of the processor give."""

import base64
import binascii
import io
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image, ImageOps

try:
    import av
    from av.stream import Disposition
except ImportError:
    av = None  # type: ignore[assignment]

_DOWNLOAD_SECONDS = 60.0
_TOLERANCE = 5e-4  # seconds by which a container's clock may round the time of a frame


class FrameSampling(NamedTuple):
    """Largest numbers of frames of a file; `wanted`: what the call says of sampling, if anything."""

    max_fps: float
    max_frames: int
    wanted: bool | None


class _Timeline(NamedTuple):
    """Times of a video's frames: ascending time stamps, their unit and the duration in seconds.

    `is_decoding_order` is true if the file has only time stamps of decoding, although its frames
    are shown in another order (AVI): then frames get the stamps in the order they are shown.
    """

    stamps: list[int]
    unit: float
    duration: float
    is_decoding_order: bool

    def seconds(self, stamp: int) -> float:
        """Return the time of a stamp in seconds from the first frame."""
        return (stamp - self.stamps[0]) * self.unit


def images_of(given: Any) -> Iterator[np.ndarray]:
    """Read the images of a nested list, one when it is asked for."""
    if given is None:
        return
    if isinstance(given, list | tuple):
        for item in given:
            yield from images_of(item)
    else:
        yield _read_image(given)


def _read_image(given: Any) -> np.ndarray:
    """Read an image as uint8 [height, width, 3], upright, transparent parts over white."""
    image = given
    if isinstance(given, str | os.PathLike):
        image = _opened(given)
    elif not isinstance(given, Image.Image):
        image = Image.fromarray(np.asarray(given))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"an image of mode {image.mode} is given: convert it to 8 bits first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _opened(given: str | os.PathLike[str]) -> Image.Image:
    """Open an image from a path, an address, or its file in base64 (or a `data:` address)."""
    shown = str(given)
    # A path or an address is shown whole, a file in base64 by its beginning.
    if len(shown) > 400:
        shown = shown[:80]
    try:
        if isinstance(given, os.PathLike) or os.path.isfile(given):
            return Image.open(given)
        if given.startswith(("http://", "https://")):
            response = httpx.get(given, timeout=_DOWNLOAD_SECONDS, follow_redirects=True)
            return Image.open(io.BytesIO(response.raise_for_status().content))
        text = given.partition(",")[2] if given.startswith("data:") else given
        return Image.open(io.BytesIO(base64.b64decode("".join(text.split()), validate=True)))
    except binascii.Error as error:
        raise ValueError(f"{shown}: is no file, no http address, and no file in base64") from error
    except (OSError, httpx.HTTPError) as error:
        raise ValueError(f"{shown}: the image cannot be read: {str(error)[:200]}") from error


def videos_of(given: Any) -> Iterator[Any]:
    """List the videos of a nested list."""
    if given is None:
        return
    if isinstance(given, list | tuple) and not _is_frame(given[:1]):
        for item in given:
            yield from videos_of(item)
    else:
        yield given


def _is_frame(first: Sequence[Any]) -> bool:
    """Return true if a list begins with one frame, and so is a video."""
    return any(isinstance(item, Image.Image) or getattr(item, "ndim", 0) == 3 for item in first)


def frames_of(video: Any, sampling: FrameSampling) -> list[np.ndarray]:
    """Read the frames of a video, each uint8 [height, width, 3]; those of a file are sampled."""
    if isinstance(video, str | os.PathLike):
        if sampling.wanted is False:
            raise ValueError(
                f"{video}: a file is always sampled: give frames for none to be left out"
            )
        path = os.fspath(video)
        return _sampled(path, max_fps=sampling.max_fps, max_frames=sampling.max_frames)
    if sampling.wanted:
        raise ValueError(
            "fps, num_frames and do_sample_frames are for video files: frames that are given are "
            "all taken"
        )
    return [_read_image(frame) for frame in video]


def _sampled(path: str, *, max_fps: float, max_frames: int) -> list[np.ndarray]:
    """Decode the frames that a file shows in the middles of equal parts."""
    if av is None:
        raise ValueError(f"{path}: PyAV reads video files: install av, or give frames")
    timeline = _timeline(path)
    starts = np.array([timeline.seconds(stamp) for stamp in timeline.stamps])
    duration = timeline.duration
    number = max(1, min(int(duration * max_fps + 1e-6), max_frames, len(starts)))
    times = (np.arange(number) + 0.5) * duration / number
    places = np.searchsorted(starts, times + _TOLERANCE, side="right") - 1
    wanted = [timeline.stamps[int(place)] for place in places]
    kept = _decoded(path, timeline, set(wanted))
    if missing := sorted(set(wanted) - kept.keys()):
        shown = ", ".join(f"{timeline.seconds(stamp):.3f}" for stamp in missing[:5])
        raise ValueError(
            f"{path}: {len(missing)} of {number} frames cannot be decoded, at {shown} seconds: "
            "repair the file, or give frames"
        )
    return [kept[stamp] for stamp in wanted]


def _timeline(path: str) -> _Timeline:
    """Read the times of all frames that a file shows."""
    with av.open(path) as container:
        stream = _video_stream(container, path)
        unit = float(stream.time_base or 0)
        packets = [
            (packet.pts, packet.duration)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard and not _is_hidden(packet)
        ]
        rate = float(stream.average_rate or 25)
        reorders = bool(stream.codec_context.has_b_frames)
    known = [(pts, duration or 0) for pts, duration in packets if pts is not None]
    if not known or len(known) < len(packets):
        raise ValueError(f"{path}: has no frames with times: give frames instead")
    ascending = sorted(known)
    stamps = [pts for pts, _ in ascending]
    return _Timeline(
        stamps=stamps,
        unit=unit,
        duration=(stamps[-1] - stamps[0]) * unit + (ascending[-1][1] * unit or 1 / rate),
        # Frames that refer to later ones follow these in the file: their times cannot ascend.
        is_decoding_order=reorders and known == ascending,
    )


def _is_hidden(packet: Any) -> bool:
    """Return true for a frame of VP8 that others refer to, and that is never shown itself."""
    # RFC 6386, section 9.1: bit 4 of a frame is show_frame.
    return packet.stream.codec_context.codec.canonical_name == "vp8" and not bytes(packet)[0] & 0x10


def _video_stream(container: Any, path: str) -> Any:
    """Select FFmpeg's best video stream, but no attached picture (cover art)."""
    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context and not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise ValueError(f"{path}: has no video stream that can be decoded")
    best = container.streams.best("video")
    return next((stream for stream in streams if stream is best), streams[0])


def _decoded(path: str, timeline: _Timeline, wanted: set[int]) -> dict[int, np.ndarray]:
    """Decode frames by their time stamps; those that cannot be decoded are left out."""
    kept: dict[int, np.ndarray] = {}
    count = 0
    with av.open(path) as container:
        for frame in _frames(container, _video_stream(container, path)):
            stamp = frame.pts
            if timeline.is_decoding_order and count < len(timeline.stamps):
                stamp = timeline.stamps[count]
            count += 1
            if stamp in wanted and stamp not in kept:
                kept[stamp] = _upright(frame, path)
            if len(kept) == len(wanted) and not timeline.is_decoding_order:
                break
    # Frames that are counted are known only if none is lost.
    if timeline.is_decoding_order and count != len(timeline.stamps):
        raise ValueError(
            f"{path}: {count} of {len(timeline.stamps)} frames can be decoded, and no time stamps "
            "tell which: repair the file, or give frames"
        )
    return kept


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decode frames in the order they are shown, without those of damaged packets."""
    for packet in container.demux(stream):
        frames = []
        with suppress(av.FFmpegError):
            frames = packet.decode()
        yield from frames


def _upright(frame: Any, path: str) -> np.ndarray:
    """Return a frame as its display matrix turns and mirrors it, uint8 [height, width, 3]."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # ISO 14496-12: a point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    # A zero row collapses the picture: no angle can be computed.
    if not (a or c) or not (b or d):
        return pixels
    cos = a / math.hypot(a, c)
    sin = b / math.hypot(b, d)
    angle = round(math.degrees(math.atan2(sin, cos))) % 360
    if angle % 90:
        raise ValueError(
            f"{path}: its display matrix turns by {angle} degrees: a multiple of 90 is needed"
        )
    if abs(cos) > abs(sin):
        return _flipped(pixels, rows=d < 0, columns=a < 0)
    return _flipped(pixels.transpose(1, 0, 2), rows=b < 0, columns=c < 0)


def _flipped(pixels: np.ndarray, *, rows: bool, columns: bool) -> np.ndarray:
    """Reverse the order of rows, of columns, or of both."""
    if rows:
        pixels = pixels[::-1]
    if columns:
        pixels = pixels[:, ::-1]
    return pixels
