"""Reading of images and videos from what callers of the processor give."""

import base64
import binascii
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image, ImageOps

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

_DOWNLOAD_SECONDS = 60.0
_TOLERANCE = 5e-4  # seconds by which a container's clock may round the time of a frame


class FrameSampling(NamedTuple):
    """Largest numbers of frames of a file; `wanted`: what the call says of sampling, if anything."""

    max_fps: float
    max_frames: int
    wanted: bool | None


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
