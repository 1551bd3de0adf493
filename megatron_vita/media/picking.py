"""Finding the frames that a clip shows at given moments, with as little decoding as is safe."""

import bisect
import math
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import av

from megatron_vita.media.clip import TOLERANCE, Clip, Coded
from megatron_vita.media.clock import Packet

_REORDERED = 17
"""A frame is decoded at most so many frames before one that is shown earlier (16 by the standards)."""
_WORTH_A_SEEK = 20.0
"""Seconds of packets that are passed over by reading rather than by a jump in the file."""

Take = Callable[[int, av.VideoFrame | None], None]
"""Takes a frame for a moment, by the moment's place; None stands for the frame that was taken last."""


class Picked(NamedTuple):
    """What was taken for a moment: the time of the frame; whether it is the one that the file tells
    to be shown then; and whether it lies between the key frame from which was decoded and the
    moment."""

    time: float
    is_exact: bool
    is_covered: bool


class Picker:
    """One pass over a clip, for ascending `moments` (seconds of the clip's clock).

    Packets that cannot be decoded are passed over: the frame before (at the start, the one after)
    stands for what they held. The pass may `jump` to the last key frame before a moment, and `skip`
    frames that neither a moment nor another frame needs; then a damaged video may give another
    frame than in a pass without, but never one said to be exact.
    """

    def __init__(
        self, clip: Clip, moments: list[float], take: Take, *, jump: bool, skip: bool
    ) -> None:
        self.lost: set[float] = set()  # times of the packets that cannot be decoded
        self._clip = clip
        self._moments = moments
        self._take_frame = take
        self._jump = jump
        self._skip = skip and not clip.counts
        self._coming: deque[Coded] = deque()  # read and not yet decoded
        self._times: list[float] = []  # of all frames read that are shown, ascending
        self._newest = clip.origin
        self._picked: list[Picked] = []
        self._broken = True  # whether what comes does not follow what was decoded
        self._start = clip.origin  # of the key frame from which is decoded
        self._first = self._shown = 0  # its place in `_times`, and frames that came out since
        self._start_place = 0  # its place in the file, where frames are counted
        self._ahead: list[int] = []  # places of the frames that came out since the last key frame
        self._last: tuple[float, av.VideoFrame] | None = None

    def run(self) -> list[Picked]:
        """Takes a frame for each moment; for fewer, if no frame can be decoded from the last one's
        key frame on."""
        for place, moment in enumerate(self._moments):
            self._read_past(moment, jump=self._jump)
            if self._last and len(self._picked) == place and self._last[0] == self._target(moment):
                self._take(*self._last)
            while len(self._picked) <= place and (self._coming or self._read()):
                self._decode(self._coming.popleft(), place)
            if len(self._picked) <= place:
                self._drain(place)
                break
        return self._picked

    def stands_in(self, place: int) -> bool:
        """Whether what was taken for a moment stands for a frame that cannot be decoded."""
        time = self._picked[place].time
        moment = self._moments[place] + TOLERANCE
        if self._picked[place].is_exact:
            return False
        if self._clip.counts:  # the times of packets are not those of their frames
            return bool(self.lost)
        if time > moment:
            return any(lost < time for lost in self.lost)
        return any(time < lost <= moment for lost in self.lost)

    def _read_past(self, moment: float, *, jump: bool = False) -> None:
        """Reads until the frame shown at `moment` is known, and forgets what is not needed for it
        on the way."""
        if (
            jump
            and moment > self._newest + _WORTH_A_SEEK
            and self._clip.seek(moment, beyond=self._newest)
        ):
            self._coming.clear()
            self._broken = True
        if jump:
            self._forget_before(moment)
        while (
            len(self._times) - bisect.bisect_right(self._times, moment + TOLERANCE) < _REORDERED
            and self._read()
        ):
            if jump and self._coming[-1].packet.is_keyframe:
                self._forget_before(moment)

    def _read(self) -> bool:
        """Whether there was another packet."""
        coded = self._clip.read()
        if coded is None:
            return False
        self._coming.append(coded)
        self._newest = max(self._newest, coded.time)
        if coded.is_shown:
            bisect.insort(self._times, coded.time)
        return True

    def _forget_before(self, moment: float) -> None:
        """Drops what comes before the last key frame that is not later than `moment`."""
        for place in range(len(self._coming) - 1, 0, -1):
            if (
                self._coming[place].packet.is_keyframe
                and self._coming[place].time <= moment + TOLERANCE
            ):
                self._coming = deque(islice(self._coming, place, None))
                self._broken = True
                return

    def _decode(self, coded: Coded, place: int) -> None:
        """Decodes a packet on the way to moment `place`."""
        if self._broken:
            self._clip.codec.flush_buffers()
            self._broken = False
            self._start = coded.time
            self._first = bisect.bisect_left(self._times, coded.time)
            self._shown = 0
            if self._clip.counts:
                self._start_place = coded.packet.pts or 0
                self._ahead = []
        if self._skip:
            self._read_past(coded.time)
            self._clip.codec.skip_frame = "DEFAULT" if self._is_wanted(coded.time) else "NONREF"
        if (frames := self._decoded(coded.packet)) is None:
            self.lost.add(coded.time)
            self._shown += 1
        else:
            self._offer(frames, place)

    def _decoded(self, packet: Packet | None) -> list[av.VideoFrame] | None:
        """What comes out of the decoder; None if it cannot decode this."""
        try:
            return self._clip.codec.decode(packet)
        except (av.FFmpegError, ValueError):  # ValueError: it refuses the stream as a whole
            return None

    def _drain(self, place: int) -> None:
        """Takes what the decoder still holds, and its last frame for all moments that are left."""
        self._offer(self._decoded(None) or [], place)
        while self._last and len(self._picked) < len(self._moments):
            self._take(*self._last)

    def _offer(self, frames: list[av.VideoFrame], place: int) -> None:
        """Frames in the order in which they are shown; that of moment `place` is known to be its
        target."""
        for frame in frames:
            time = self._clip.time_of(frame)
            if time is None:
                self._settle_count(frame)
                counted = min(self._first + self._shown, len(self._times) - 1)
                time = self._times[counted] if self._times else self._start
            self._shown += 1
            while (
                len(self._picked) < len(self._moments)
                and time > self._moments[len(self._picked)] + TOLERANCE
            ):
                self._take(*(self._last or (time, frame)))
            self._last = (time, frame)
            if len(self._picked) == place and time == self._target(self._moments[place]):
                self._take(time, frame)

    def _settle_count(self, frame: av.VideoFrame) -> None:
        """Count anew at a key frame, since a decoder may have dropped frames: what comes before it
        in the file is shown before it, and so is what the decoder has given already."""
        if frame.pts is None:
            return
        if frame.key_frame:
            before = sum(place > frame.pts for place in self._ahead)
            self._shown = frame.pts - self._start_place + before
            self._ahead = []
        self._ahead.append(frame.pts)

    def _take(self, time: float, frame: av.VideoFrame) -> None:
        place = len(self._picked)
        moment = self._moments[place]
        is_same = bool(place) and self._picked[-1].time == time
        self._take_frame(place, None if is_same else frame)
        is_covered = self._start - TOLERANCE <= time <= moment + TOLERANCE
        self._picked.append(Picked(time, time == self._target(moment), is_covered))

    def _target(self, moment: float) -> float:
        """Time of the frame shown at `moment`, if it has been read past."""
        if self._times:
            return self._times[max(bisect.bisect_right(self._times, moment + TOLERANCE) - 1, 0)]
        return moment

    def _is_wanted(self, time: float) -> bool:
        """Whether the frame of this time is shown at any moment."""
        after = bisect.bisect_right(self._times, time)
        if after <= 1:
            return True
        place = bisect.bisect_left(self._moments, time - TOLERANCE)
        until = self._times[after] if after < len(self._times) else math.inf
        return place < len(self._moments) and self._moments[place] + TOLERANCE < until
