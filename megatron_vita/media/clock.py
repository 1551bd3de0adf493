"""One clock for streams whose time stamps jump, such as recordings that were joined.

The rule is that of FFmpeg's command line for formats that it says may jump (MPEG-TS, MPEG-PS, Ogg):
a packet is decoded when the one before has lasted its time. Where its stamp is more than 10 seconds
off that, or more than a tenth of a second before the last packet's, this and all later stamps are
moved. A shorter gap is one, and stays. FFmpeg also moves frames that are always so far apart, as in
slide shows; here these keep their times.
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
"""Packets from which the usual time between two is told."""


def steady(packets: Iterator[Packet], *, unit: float, frame_seconds: float) -> Iterator[Packet]:
    """Packets of a stream, in the order of the file, with stamps that do not jump.

    `unit`: seconds of a stamp's step; `frame_seconds`: of a packet that has no duration.
    """
    head = list(itertools.islice(packets, _HEAD))
    stamps = [packet.dts for packet in head if packet.dts is not None]
    gaps = [abs(later - earlier) for earlier, later in itertools.pairwise(stamps)]
    usual = statistics.median_high(gaps) if gaps else 0
    clock = _SteadyClock(unit, step=max(round(frame_seconds / unit), usual))
    for packet in itertools.chain(head, packets):
        clock.move(packet)
        yield packet


class _SteadyClock:
    """Moves the stamps of packets."""

    def __init__(self, unit: float, *, step: int) -> None:
        self._far = max(_FAR_SECONDS / unit, _FAR_FRAMES * step)
        self._back = _BACK_SECONDS / unit
        self._step = step
        self._offset = 0
        self._delay = 0  # from decoding to presentation
        self._last: int | None = None  # the decoding stamp before, moved
        self._next = 0  # the one that follows if nothing jumps

    def move(self, packet: Packet) -> None:
        """Set the stamps of the next packet."""
        if packet.dts is not None:
            self._note_jump(packet.dts + self._offset)
            packet.dts += self._offset
        if packet.pts is not None:
            packet.pts += self._offset
        if packet.pts is not None and packet.dts is not None:
            # FFmpeg takes a missing presentation stamp from the next packet, which may be beyond
            # a jump.
            if abs(packet.pts - packet.dts) > self._far:
                packet.pts = packet.dts + self._delay
            self._delay = packet.pts - packet.dts
        if packet.dts is not None or self._last is not None:
            self._last = self._next if packet.dts is None else packet.dts
            self._next = self._last + (packet.duration or self._step)

    def _note_jump(self, stamp: int) -> None:
        if self._last is None:
            return
        is_far = abs(stamp - self._next) > self._far
        if is_far or stamp + self._back < self._last:
            self._offset += self._next - stamp
