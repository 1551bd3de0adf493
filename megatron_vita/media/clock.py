"""Continuous time stamps for streams whose time stamps jump, such as joined recordings.

The rule is that of FFmpeg's command line for formats with discontinuities (MPEG-TS, MPEG-PS, Ogg):
the decoding time of a packet is predicted as that of the one before plus its duration. If the stamp
is more than 10 seconds off, or more than a tenth of a second before the previous packet's, this and
all later stamps are shifted. Shorter gaps are kept. FFmpeg also shifts frames that are always far
apart, as in slide shows; here these keep their times.
"""

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import av

# Generic in PyAV's stubs alone: the alias is not evaluated at run time.
type Packet = av.Packet[Any]

_FAR_SECONDS = 10.0
_FAR_FRAMES = 10
_BACK_SECONDS = 0.1
_HEAD = 64
"""Packets that are read to find the usual time between two."""


def steady(packets: Iterator[Packet], *, unit: float, frame_seconds: float) -> Iterator[Packet]:
    """Yield the packets of a stream, in file order, with stamps that do not jump.

    Args:
        packets: packets in file order; their stamps are changed in place.
        unit: seconds of one step of a time stamp.
        frame_seconds: duration of packets that state none.
    """
    head = list(itertools.islice(packets, _HEAD))
    stamps = [packet.dts for packet in head if packet.dts is not None]
    gaps = [abs(later - earlier) for earlier, later in itertools.pairwise(stamps)]
    usual = 0
    if gaps:
        usual = statistics.median_high(gaps)
    clock = _SteadyClock(unit, step=max(round(frame_seconds / unit), usual))
    for packet in itertools.chain(head, packets):
        clock.move(packet)
        yield packet


class _SteadyClock:
    """Offset that makes the stamps of successive packets continuous."""

    def __init__(self, unit: float, *, step: int) -> None:
        self._far = max(_FAR_SECONDS / unit, _FAR_FRAMES * step)
        self._back = _BACK_SECONDS / unit
        self._step = step
        self._offset = 0
        self._delay = 0  # from decoding to presentation
        self._last: int | None = None  # previous decoding stamp, shifted
        self._next = 0  # the decoding stamp expected next

    def move(self, packet: Packet) -> None:
        """Shift the stamps of the next packet."""
        if packet.dts is not None:
            self._note_jump(packet.dts + self._offset)
            packet.dts += self._offset
        if packet.pts is not None:
            packet.pts += self._offset
        if packet.pts is not None and packet.dts is not None:
            # FFmpeg fills in a missing presentation stamp from the next packet, which may follow a
            # jump: use the previous packet's delay between decoding and presentation instead.
            if abs(packet.pts - packet.dts) > self._far:
                packet.pts = packet.dts + self._delay
            self._delay = packet.pts - packet.dts
        if packet.dts is not None or self._last is not None:
            self._last = packet.dts
            if self._last is None:
                self._last = self._next
            self._next = self._last + (packet.duration or self._step)

    def _note_jump(self, stamp: int) -> None:
        if self._last is None:
            return
        is_far = abs(stamp - self._next) > self._far
        if is_far or stamp + self._back < self._last:
            self._offset += self._next - stamp
