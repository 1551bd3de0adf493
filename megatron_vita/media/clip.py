"""Demuxing of a video file: its packets one by one, with presentation times."""

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
"""Largest frame in pixels (8192 x 8192): decoders hold up to 17 frames."""
_HEAD = 64
"""Frames that are read to find the first time and the kind of time stamps."""
_WITH_INDEX = ("mov", "matroska")
"""Containers with a reliable index of key frames; that of others may hold guesses (MPEG-TS)."""

_NO_PROTOCOLS = {"protocol_whitelist": "none"}
"""Keeps FFmpeg from opening the files and hosts that playlists and session descriptions name."""


class Coded(NamedTuple):
    """A packet with the presentation time of its frame, in seconds of the container's clock.

    `is_shown` is false for frames that an edit list cuts out; other frames may depend on them.
    """

    packet: Packet
    time: float
    is_shown: bool


class Clip:
    """A video stream, read packet by packet.

    `origin` is the time of the first frame; `rate` is the frame rate in 1/s, 0 if unknown. `counts`
    is true if the container has no time stamps (raw streams), or only those of decoding (AVI): then
    frames must be counted after decoding, since their own times mean nothing, and their `pts` is
    the index of their packet in the file.
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
            # The index of a Matroska file is at its end: FFmpeg reads it at the first seek.
            with suppress(av.FFmpegError):
                self._container.seek(0, stream=stream)
        self._packets = self._demux()
        may_jump = self._container.format.flags & cast(int, Flags.ts_discont.value)
        if may_jump and self._unit:
            frame_seconds = 0.0
            if self.rate:
                frame_seconds = 1 / self.rate
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
        stamps = list(map(_stamp, head))
        known = [stamp for stamp in stamps if stamp is not None]
        self._timeless = len(known) < len(stamps)
        # With B-frames presentation times cannot ascend in file order: ascending stamps are those
        # of decoding.
        self.counts = self._timeless or (bool(self.codec.has_b_frames) and known == sorted(known))
        times = [self._time(packet, index) for index, packet in enumerate(head)]
        self.origin = min(
            (t for t, p in zip(times, head, strict=True) if not p.is_discard), default=times[0]
        )

    def read(self) -> Coded | None:
        """Read the next packet in file order; None at the end of the file, or at a read error."""
        packet = next(self._packets, None)
        if packet is None:
            return None
        coded = Coded(packet, self._time(packet, self.num_read), not packet.is_discard)
        if self.counts:
            # The decoder passes the stamp on to the frame: it identifies the frame's packet.
            packet.pts = self.num_read
        self.num_read += 1
        return coded

    def seek(self, moment: float, *, beyond: float) -> bool:
        """Seek to the last key frame before `moment`, if the container's index has one after
        `beyond`.

        Both are in seconds of the container's clock. Returns whether the position changed.
        """
        if not self._has_index or self.counts:
            return False
        stamp = int((moment + TOLERANCE) / self._unit)
        entries = self._stream.index_entries
        index = entries.search_timestamp(stamp, backward=True)
        if index < 0 or entries[index].timestamp * self._unit <= beyond:
            return False
        with suppress(av.FFmpegError):
            self._container.seek(stamp, stream=self._stream, backward=True)
        self._packets = self._demux()
        return True

    def duration_of(self, coded: Coded) -> float:
        """Duration of a frame in seconds; 0 if unknown."""
        if coded.packet.duration and self._unit:
            return coded.packet.duration * self._unit
        if self.rate:
            return 1 / self.rate
        return 0.0

    def time_of(self, frame: av.VideoFrame) -> float | None:
        """Presentation time of a decoded frame in seconds; None if frames must be counted."""
        if self.counts or frame.pts is None:
            return None
        return frame.pts * self._unit

    def _time(self, packet: Packet, index: int) -> float:
        stamp = _stamp(packet)
        if self._timeless or stamp is None:
            return index / (self.rate or 25)
        return stamp * self._unit

    def _demux(self) -> Iterator[Packet]:
        try:
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
        except av.FFmpegError as error:
            logger.warning("%s: %s", self._name, error)


def _stamp(packet: Packet) -> int | None:
    """Presentation stamp of a packet, else its decoding stamp."""
    if packet.pts is None:
        return packet.dts
    return packet.pts


@contextmanager
def open_clip(data: File, name: str) -> Iterator[Clip]:
    """Open the video stream that FFmpeg ranks best, for decoding in one thread.

    Raises:
        DataError: naming the video by `name`: there is no video stream, or it has no frame.
    """
    try:
        with av.open(opened(data), options=_NO_PROTOCOLS) as container:
            stream = _best_stream(cast(InputContainer, container), name)
            # Loader processes decode side by side; threads of FFmpeg would oversubscribe the cores.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield Clip(stream, name)
    except av.FFmpegError as error:
        raise DataError(
            f"{name}: cannot read this video of {num_bytes(data)} bytes: {error}"
        ) from error


def _best_stream(container: InputContainer, name: str) -> av.VideoStream:
    """Select FFmpeg's best video stream among those that can be decoded.

    Raises:
        DataError: naming the video by `name`: there is none.
    """
    best = container.streams.best("video")
    streams = [stream for stream in container.streams.video if _can_be_shown(stream)]
    if not streams:
        kinds = [_kind(stream) for stream in container.streams]
        raise DataError(f"{name}: no video stream that can be decoded among {kinds}")
    return next((stream for stream in streams if stream is best), streams[0])


def _can_be_shown(stream: av.VideoStream) -> bool:
    """Return false for attached pictures (cover art) and unknown codecs."""
    return stream.codec_context is not None and not stream.disposition & Disposition.attached_pic


def _kind(stream: Stream) -> str:
    is_attached = stream.disposition & Disposition.attached_pic
    if is_attached:
        return "attached picture"
    return stream.type
