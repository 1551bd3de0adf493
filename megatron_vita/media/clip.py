"""The compressed frames of a video file, read one by one, and when each of them is shown."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, cast

import av
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition, Stream

from megatron_vita.errors import DataError
from megatron_vita.media.clock import Packet, steady
from megatron_vita.media.files import File, num_bytes, opened

logger = logging.getLogger(__name__)

TOLERANCE = 5e-4
"""Seconds by which a container's clock (often of milliseconds) may round the time of a frame."""
MAX_FRAME_PIXELS = 2**26
"""Most pixels of a frame (8192 x 8192): decoders hold up to 17 of them."""
_HEAD = 64
"""Frames from which a video's beginning and kind of time stamps are told."""
_WITH_INDEX = ("mov", "matroska")
"""Containers whose index tells where key frames are; what others call one may be of guessed places (MPEG-TS)."""

_NO_PROTOCOLS = {"protocol_whitelist": "none"}
"""Keeps FFmpeg within the file: playlists and session descriptions name other files and hosts, which it would open."""


class Coded(NamedTuple):
    """A packet and when its frame is shown, in seconds of the container's clock; some (edited out)
    are not shown."""

    packet: Packet
    time: float
    is_shown: bool


class Clip:
    """A video stream.

    `origin` is the time of the first frame; `rate` is of frames in a second, 0 if unknown. Where
    `counts` is true, the container has no times (raw streams), or those of decoding only (AVI):
    then the frames that are decoded must be counted, since their own times mean nothing; their
    `pts` is the place of their packet in the file.
    """

    def __init__(self, stream: av.VideoStream, name: str) -> None:
        self.codec = stream.codec_context
        self.rate = float(stream.average_rate or 0)
        self.num_read = 0
        self._stream = stream
        self._name = name
        self._container = cast(InputContainer, stream.container)
        self._unit = float(stream.time_base or 0)
        self._has_index = self._container.format.name.startswith(_WITH_INDEX)
        if self._container.format.name.startswith("matroska"):
            with suppress(av.FFmpegError):
                self._container.seek(0, stream=stream)  # loads the index
        self._packets = self._demux()
        may_jump = self._container.format.flags & cast(int, Flags.ts_discont.value)
        if may_jump and self._unit:
            frame_seconds = 1 / self.rate if self.rate else 0.0
            self._packets = steady(self._packets, unit=self._unit, frame_seconds=frame_seconds)
        self._begin()

    def _begin(self) -> None:
        head: list[Packet] = []
        shown = 0
        for packet in self._packets:
            head.append(packet)
            shown += not packet.is_discard
            if shown == _HEAD:
                break
        if not head:
            raise DataError(f"{self._name}: this video holds no frame")
        self._packets = itertools.chain(head, self._packets)
        stamps = [packet.dts if packet.pts is None else packet.pts for packet in head]
        known = [stamp for stamp in stamps if stamp is not None]
        self._timeless = len(known) < len(stamps)
        self.counts = self._timeless or (bool(self.codec.has_b_frames) and known == sorted(known))
        times = [self._time(packet, place) for place, packet in enumerate(head)]
        self.origin = min(
            (t for t, p in zip(times, head, strict=True) if not p.is_discard), default=times[0]
        )

    def read(self) -> Coded | None:
        """The next packet in the order of the file; None at its end, or where it cannot be read
        on."""
        packet = next(self._packets, None)
        if packet is None:
            return None
        coded = Coded(packet, self._time(packet, self.num_read), not packet.is_discard)
        if self.counts:  # the decoder hands it on with the frame
            packet.pts = self.num_read
        self.num_read += 1
        return coded

    def seek(self, moment: float, *, beyond: float) -> bool:
        """Goes on at a key frame before `moment`, if the container's index knows one that comes
        after `beyond`."""
        if not self._has_index or self.counts:
            return False
        stamp = int((moment + TOLERANCE) / self._unit)
        entries = self._stream.index_entries
        place = entries.search_timestamp(stamp, backward=True)
        if place < 0 or entries[place].timestamp * self._unit <= beyond:
            return False
        with suppress(av.FFmpegError):
            self._container.seek(stamp, stream=self._stream, backward=True)
        self._packets = self._demux()
        return True

    def duration_of(self, coded: Coded) -> float:
        """Seconds for which a frame is shown; 0 if nothing tells."""
        return (coded.packet.duration or 0) * self._unit or (1 / self.rate if self.rate else 0.0)

    def time_of(self, frame: av.VideoFrame) -> float | None:
        """When a decoded frame is shown; None if it must be told by counting."""
        if self.counts or frame.pts is None:
            return None
        return frame.pts * self._unit

    def _time(self, packet: Packet, place: int) -> float:
        stamp = packet.dts if packet.pts is None else packet.pts
        if self._timeless or stamp is None:
            return place / (self.rate or 25)
        return stamp * self._unit

    def _demux(self) -> Iterator[Packet]:
        try:
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
        except av.FFmpegError as error:
            logger.warning("%s: %s", self._name, error)


@contextmanager
def open_clip(data: File, name: str) -> Iterator[Clip]:
    """The video stream of a file that FFmpeg calls the best, to be decoded in one thread.

    Raises DataError, which names the video by `name`, if there is none or it holds no frame.
    """
    try:
        with av.open(opened(data), options=_NO_PROTOCOLS) as container:
            stream = _best_stream(cast(InputContainer, container), name)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield Clip(stream, name)
    except av.FFmpegError as error:
        raise DataError(
            f"{name}: cannot read this video of {num_bytes(data)} bytes: {error}"
        ) from error


def _best_stream(container: InputContainer, name: str) -> av.VideoStream:
    """The best of the video streams that can be shown; DataError, by `name`, if there is none."""
    best = container.streams.best("video")
    streams = [stream for stream in container.streams.video if _can_be_shown(stream)]
    if not streams:
        kinds = [_kind(stream) for stream in container.streams]
        raise DataError(f"{name}: no video stream that can be decoded among {kinds}")
    return next((stream for stream in streams if stream is best), streams[0])


def _can_be_shown(stream: av.VideoStream) -> bool:
    """Whether it is neither an attached picture nor of an unknown codec."""
    return stream.codec_context is not None and not stream.disposition & Disposition.attached_pic


def _kind(stream: Stream) -> str:
    is_attached = stream.disposition & Disposition.attached_pic
    if is_attached:
        return "attached picture"
    return stream.type
