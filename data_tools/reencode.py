"""Media encoded anew on their way into a shard: images as JPEG, videos in short groups of pictures
at a low rate."""

import bisect
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import av
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from data_tools.frames import FRAMES_SUFFIX
from megatron_vita.data.shards.tar import MediaFile
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.images import open_image
from megatron_vita.media.video import num_frames, probe_video

X264 = {"crf": "20", "preset": "veryfast", "threads": "1", "bf": "0", "sc_threshold": "0"}
UNLIMITED = 1 << 40
TOLERANCE = 5e-4


@dataclass(frozen=True, kw_only=True)
class Reencode:
    """What changes; 0 leaves as it is. `jpeg_quality` of 1 to 100; `video_gop` in seconds,
    `video_fps` frames a second.

    Where only `video_fps` is given, a key frame begins each second. Sound is left out, orientation
    is made real.
    """

    jpeg_quality: int = 0
    video_gop: float = 0.0
    video_fps: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.jpeg_quality <= 100:
            raise ConfigError(
                f"--jpeg-quality is {self.jpeg_quality}: 1 to 100, or 0 to keep images as they are"
            )
        for name in ("video_gop", "video_fps"):
            if not 0 <= getattr(self, name) < 1e4:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative"
                )

    def __call__(self, kind: str, file: MediaFile) -> MediaFile:
        """The medium as it goes into the shard. DataError if it cannot be decoded."""
        if kind == "image" and self.jpeg_quality:
            return MediaFile(".jpg", _jpeg(file.data, self.jpeg_quality))
        if kind == "video" and (self.video_gop or self.video_fps) and file.suffix != FRAMES_SUFFIX:
            return MediaFile(".mp4", self._video(file.data))
        return file

    def _video(self, data: bytes) -> bytes:
        """The video re-cut. At a lower rate, a frame is what the source shows in the middle of the
        frame's time.

        So sampling at that rate or a lower divisor of it finds the same pictures as in the source.
        """
        info = probe_video(data, "the video")
        frames = num_frames(info, max_fps=self.video_fps or UNLIMITED, max_frames=UNLIMITED)
        if info.duration <= 0:
            raise DataError("the video has no duration: it cannot be cut at a rate")
        moments = [(i + 0.5) * info.duration / frames for i in range(frames)]
        rate = Fraction(frames / info.duration).limit_denominator(1 << 16)
        gop = max(1, round((self.video_gop or 1.0) * float(rate)))
        try:
            return _encode(_shown_at(data, moments), rate=rate, gop=gop)
        except av.FFmpegError as error:
            raise DataError(f"the video cannot be encoded anew: {error}") from error


KEEP = Reencode()


def _jpeg(data: bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        open_image(data, "the image").save(buffer, "JPEG", quality=quality)
    except OSError as error:
        raise DataError(f"the image cannot be stored as JPEG: {error}") from error
    return buffer.getvalue()


def _shown_at(data: bytes, moments: list[float]) -> Iterator[av.VideoFrame]:
    """The frame shown at each of the moments (seconds from the first frame, ascending)."""
    place = 0
    last: av.VideoFrame | None = None
    with av.open(io.BytesIO(data)) as container:
        for time, frame in _timed(cast(InputContainer, container)):
            stop = (
                bisect.bisect_left(moments, time - TOLERANCE, lo=place)
                if last is not None
                else place
            )
            yield from itertools.repeat(cast(av.VideoFrame, last), stop - place)
            place, last = stop, frame
    if last is None:
        raise DataError("no frame of the video can be decoded")
    yield from itertools.repeat(last, len(moments) - place)


def _timed(container: InputContainer) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames with their times from the first one; counted where the container has none. Bad packets
    are passed over."""
    stream = next(
        s for s in container.streams.video if not s.disposition & Disposition.attached_pic
    )
    stream.codec_context.thread_count = 1
    rate, first = float(stream.average_rate or 25), None
    count = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            time = count / rate if frame.time is None else frame.time
            first = time if first is None else first
            yield time - first, frame
            count += 1


def _encode(frames: Iterator[av.VideoFrame], *, rate: Fraction, gop: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: VideoStream | None = None
        for i, frame in enumerate(frames):
            image = frame.to_image().rotate(frame.rotation, expand=True)
            if stream is None:
                stream = _new_stream(container, rate=rate, gop=gop, size=image.size)
            picture = av.VideoFrame.from_image(image).reformat(
                stream.width, stream.height, "yuv420p"
            )
            picture.pts, picture.time_base = i, 1 / rate
            container.mux(stream.encode(picture))
        assert stream is not None, "there is a frame for each moment"
        container.mux(stream.encode())
    return buffer.getvalue()


def _new_stream(
    container: OutputContainer, *, rate: Fraction, gop: int, size: tuple[int, int]
) -> VideoStream:
    stream = container.add_stream("libx264", rate=rate, options=X264)
    stream.width, stream.height = (max(side // 2 * 2, 2) for side in size)
    stream.pix_fmt, stream.gop_size, stream.time_base = "yuv420p", gop, 1 / rate
    return stream
