"""Re-encoding of media for shards: images as JPEG, videos with short groups of pictures."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
from av.video.frame import PictureType
from av.video.stream import VideoStream

from megatron_vita.config.parsing.fields import check_fields, described
from megatron_vita.data.shards.tar import ShardMedia
from megatron_vita.errors import DataError
from megatron_vita.media.clip import TOLERANCE
from megatron_vita.media.clock import Packet
from megatron_vita.media.frame_archive import is_archive
from megatron_vita.media.images import open_image, upright
from megatron_vita.media.video import (
    Report,
    frame_pixels,
    frame_starts,
    num_frames,
    probe_video,
    walk_frames,
)

logger = logging.getLogger(__name__)

# One thread for reproducible bytes; neither B-frames nor scene cuts, so that frames are stored in
# the order shown, and key frames are only those set by time.
X264 = {"crf": "20", "preset": "veryfast", "threads": "1", "bf": "0", "sc_threshold": "0"}
NO_KEY_FRAMES = 1 << 20
"""Group size of the encoder, never reached: key frames are set by time instead."""
UNLIMITED = 1 << 40
CLOCK = Fraction(1, 90000)
"""Time base of the written stamps in seconds."""


@dataclass(frozen=True, kw_only=True)
class Reencode:
    """Settings for re-encoding, which are options of `shard`.

    With `video_fps` alone a key frame begins each second. Sound is dropped, and orientation is
    applied to the pixels.
    """

    jpeg_quality: int = described(
        0, "Re-encode images as JPEG of this quality; 0: keep them.", ge=0, le=100
    )
    video_gop: float = described(
        0.0,
        "Re-encode videos with a key frame every this many seconds; 0: keep them.",
        ge=0,
        lt=1e4,
    )
    video_fps: float = described(
        0.0, "Re-encode videos at this frame rate, as sampled; 0: keep theirs.", ge=0, lt=1e4
    )

    def __post_init__(self) -> None:
        check_fields(self, as_options=True)

    def __call__(self, kind: str, file: ShardMedia, *, prefix: str = "") -> ShardMedia:
        """Re-encode a medium; raises DataError if it cannot be decoded.

        A video with undecodable frames is kept as it is, with a warning that begins with `prefix`.
        """
        if kind == "image" and self.jpeg_quality:
            return ShardMedia(".jpg", _jpeg(file.data, self.jpeg_quality))
        if kind == "video" and (self.video_gop or self.video_fps) and not is_archive(file.data):
            # Re-encoded, the frames that replace damaged ones would count as good.
            damage: list[str] = []
            made = self._video(file.data, report=lambda _, reason: damage.append(reason))
            if not damage:
                return ShardMedia(".mp4", made)
            logger.warning("%s%s; it is kept as it is", prefix, damage[0])
        return file

    def _video(self, data: bytes, *, report: Report) -> bytes:
        """Re-encode a video, at `video_fps` or with the times of its own frames.

        At a lower rate, a frame is what the source shows in the middle of the frame's time, so that
        sampling at that rate or a divisor of it finds the same pictures as in the source.
        """
        info = probe_video(data, "the video")
        if info.duration <= 0:
            raise DataError("the video has no duration: it cannot be cut at a rate")
        if self.video_fps:
            frames = num_frames(info, max_fps=self.video_fps, max_frames=UNLIMITED)
            starts = [i * info.duration / frames for i in range(frames)]
            moments = [start + 0.5 * info.duration / frames for start in starts]
        else:
            moments = starts = frame_starts(data, "the video")
        try:
            return _encode(
                data,
                moments,
                starts=[*starts, info.duration],
                gop=self.video_gop or 1.0,
                report=report,
            )
        except av.FFmpegError as error:
            raise DataError(f"the video cannot be re-encoded: {error}") from error


KEEP = Reencode()


def _jpeg(data: bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        open_image(data, "the image").save(buffer, "JPEG", quality=quality)
    except OSError as error:
        raise DataError(f"the image cannot be stored as JPEG: {error}") from error
    return buffer.getvalue()


def _encode(
    data: bytes,
    moments: Sequence[float],
    *,
    starts: Sequence[float],
    gop: float,
    report: Report,
) -> bytes:
    """Encode the frames that `data` shows at `moments`, to be shown from `starts` on.

    Args:
        data: the source video.
        moments: times in the source in seconds, ascending.
        starts: times in the result in seconds, and one more: its end.
        gop: seconds between key frames.
        report: called for undecodable frames.
    """
    buffer = io.BytesIO()
    # Bit-exact: without versions and times in the file, equal input gives equal bytes.
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        encoder = _Encoder(container, starts, gop=gop)
        walk_frames(data, "the video", times=moments, take=encoder.take, report=report)
        encoder.close()
    return buffer.getvalue()


class _Encoder:
    """Encoder of frames in order."""

    def __init__(
        self, container: av.container.OutputContainer, starts: Sequence[float], *, gop: float
    ) -> None:
        self._container = container
        self._starts = starts
        self._stamps = [round(start / CLOCK) for start in starts]
        self._gop = gop
        self._stream: VideoStream | None = None
        self._picture: av.VideoFrame | None = None
        self._place = 0

    def take(self, index: int, frame: av.VideoFrame | None) -> None:
        """Encode frame number `index`; None repeats the one before."""
        if frame is not None:
            image = upright(frame_pixels(frame, "the video"))
            if self._stream is None:
                self._stream = self._new_stream(image.size)
            self._picture = av.VideoFrame.from_image(image).reformat(
                self._stream.width, self._stream.height, "yuv420p"
            )
        assert self._stream is not None, "the first frame is there"
        assert self._picture is not None, "the first frame is there"
        self._picture.pts = self._stamps[index]
        self._picture.time_base = CLOCK
        # The encoder decides, but for the first frame of a group, to which readers seek.
        self._picture.pict_type = PictureType.NONE
        if not index or self._group(index) > self._group(index - 1):
            self._picture.pict_type = PictureType.I
        self._write(self._stream.encode(self._picture))

    def close(self) -> None:
        """Flush the encoder."""
        assert self._stream is not None, "there is a frame for each moment"
        self._write(self._stream.encode())

    def _group(self, index: int) -> int:
        # A start that rounding has put just before a group's beginning belongs to the group.
        return int((self._starts[index] + TOLERANCE) / self._gop)

    def _write(self, packets: list[Packet]) -> None:
        for packet in packets:
            # Packets leave in the order of frames, since X264 makes no B-frames.
            packet.duration = self._stamps[self._place + 1] - self._stamps[self._place]
            self._place += 1
            self._container.mux(packet)

    def _new_stream(self, size: tuple[int, int]) -> VideoStream:
        rate = Fraction((len(self._starts) - 1) / self._starts[-1]).limit_denominator(1 << 16)
        stream = self._container.add_stream("libx264", rate=rate, options=X264)
        # yuv420p needs even sides.
        stream.width, stream.height = (max(side // 2 * 2, 2) for side in size)
        stream.pix_fmt = "yuv420p"
        stream.gop_size = NO_KEY_FRAMES
        stream.codec_context.time_base = CLOCK
        return stream
