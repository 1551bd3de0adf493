"""Selection of the frames that a clip shows at given moments, with as little decoding as safe."""

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
"""Frames to read ahead: a frame may be decoded up to 16 frames before one that is shown earlier."""
_WORTH_A_SEEK = 20.0
"""Seconds of video that are skipped by reading packets rather than by a seek."""

Take = Callable[[int, av.VideoFrame | None], None]
"""Callback (i, frame) with the frame selected for moment i; None: the same frame as before."""


class Picked(NamedTuple):
    """Frame selected for a moment.

    Attributes:
        time: presentation time of the frame in seconds.
        is_exact: the frame is the one that the file shows at the moment.
        is_covered: the frame lies between the key frame at which decoding started and the moment.
    """

    time: float
    is_exact: bool
    is_covered: bool


class Picker:
    """One pass over a clip that selects frames for ascending `moments` (seconds of the clip's
    clock).

    Packets that cannot be decoded are skipped: the frame before (at the start, the one after)
    replaces theirs. The pass may `jump` to the last key frame before a moment, and `skip` frames on
    which neither a moment nor another frame depends. A damaged video may then yield other frames
    than without, but none of those is marked exact.
    """

    def __init__(
        self, clip: Clip, moments: list[float], take: Take, *, jump: bool, skip: bool
    ) -> None:
        self.lost: set[float] = set()  # times of the packets that cannot be decoded
        self._clip = clip
        self._moments = moments
        self._take_frame = take
        self._jump = jump
        # Counting frames after decoding needs all of them: none may be skipped.
        self._skip = skip and not clip.counts
        self._coming: deque[Coded] = deque()  # packets read and not yet decoded
        self._times: list[float] = []  # times of all shown frames read so far, ascending
        self._newest = clip.origin
        self._picked: list[Picked] = []
        self._broken = True  # the next packet does not follow the last decoded one
        self._start = clip.origin  # time of the key frame at which decoding started
        self._first = self._shown = 0  # its index in `_times`, and frames decoded since
        self._start_index = 0  # its index in the file, if frames are counted
        self._ahead: list[int] = []  # indices of the frames decoded since the last key frame
        self._last: tuple[float, av.VideoFrame] | None = None

    def run(self) -> list[Picked]:
        """Select a frame for each moment.

        Returns fewer if no frame can be decoded from the last moment's key frame on.
        """
        for index, moment in enumerate(self._moments):
            self._read_past(moment, jump=self._jump)
            if self._last and len(self._picked) == index and self._last[0] == self._target(moment):
                self._take(*self._last)
            while len(self._picked) <= index and (self._coming or self._read()):
                self._decode(self._coming.popleft(), index)
            if len(self._picked) <= index:
                self._drain(index)
                break
        return self._picked

    def stands_in(self, index: int) -> bool:
        """Return true if the frame selected for a moment replaces one that cannot be decoded."""
        time = self._picked[index].time
        moment = self._moments[index] + TOLERANCE
        if self._picked[index].is_exact:
            return False
        if self._clip.counts:
            # Times of packets are not those of their frames: any loss may be of this frame.
            return bool(self.lost)
        if time > moment:
            return any(lost < time for lost in self.lost)
        return any(time < lost <= moment for lost in self.lost)

    def _read_past(self, moment: float, *, jump: bool = False) -> None:
        """Read packets until the frame shown at `moment` is known; with `jump`, drop those not
        needed for it."""
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
        """Read the next packet; return false at the end of the clip."""
        coded = self._clip.read()
        if coded is None:
            return False
        self._coming.append(coded)
        self._newest = max(self._newest, coded.time)
        if coded.is_shown:
            bisect.insort(self._times, coded.time)
        return True

    def _forget_before(self, moment: float) -> None:
        """Drop the packets before the last key frame that is not later than `moment`."""
        for index in range(len(self._coming) - 1, 0, -1):
            if (
                self._coming[index].packet.is_keyframe
                and self._coming[index].time <= moment + TOLERANCE
            ):
                self._coming = deque(islice(self._coming, index, None))
                self._broken = True
                return

    def _decode(self, coded: Coded, index: int) -> None:
        """Decode a packet that moment number `index` needs."""
        if self._broken:
            # A gap in the packets: frames that the decoder still holds belong to earlier moments.
            self._clip.codec.flush_buffers()
            self._broken = False
            self._start = coded.time
            self._first = bisect.bisect_left(self._times, coded.time)
            self._shown = 0
            if self._clip.counts:
                self._start_index = coded.packet.pts or 0
                self._ahead = []
        if self._skip:
            # Whether a frame is wanted depends on when the next one is shown.
            self._read_past(coded.time)
            if self._is_wanted(coded.time):
                self._clip.codec.skip_frame = "DEFAULT"
            else:
                self._clip.codec.skip_frame = "NONREF"
        if (frames := self._decoded(coded.packet)) is None:
            self.lost.add(coded.time)
            self._shown += 1
        else:
            self._offer(frames, index)

    def _decoded(self, packet: Packet | None) -> list[av.VideoFrame] | None:
        """Frames that the decoder returns for a packet; None if it cannot decode it."""
        try:
            return self._clip.codec.decode(packet)
        except (av.FFmpegError, ValueError):  # ValueError: the decoder cannot open the stream
            return None

    def _drain(self, index: int) -> None:
        """Flush the decoder, and use its last frame for all moments that remain."""
        self._offer(self._decoded(None) or [], index)
        while self._last and len(self._picked) < len(self._moments):
            self._take(*self._last)

    def _offer(self, frames: list[av.VideoFrame], index: int) -> None:
        """Select from frames in presentation order; the target of moment `index` must be known."""
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
            if len(self._picked) == index and time == self._target(self._moments[index]):
                self._take(time, frame)

    def _settle_count(self, frame: av.VideoFrame) -> None:
        """Correct the count of frames at a key frame, since a decoder may have dropped some."""
        if frame.pts is None:
            return
        if frame.key_frame:
            # Shown before the key frame are all frames before it in the file, and those behind it
            # that the decoder has already returned.
            before = sum(index > frame.pts for index in self._ahead)
            self._shown = frame.pts - self._start_index + before
            self._ahead = []
        self._ahead.append(frame.pts)

    def _take(self, time: float, frame: av.VideoFrame) -> None:
        index = len(self._picked)
        moment = self._moments[index]
        if index and self._picked[-1].time == time:
            self._take_frame(index, None)
        else:
            self._take_frame(index, frame)
        is_covered = self._start - TOLERANCE <= time <= moment + TOLERANCE
        self._picked.append(Picked(time, time == self._target(moment), is_covered))

    def _target(self, moment: float) -> float:
        """Time of the frame shown at `moment`, if the packets after it have been read."""
        if self._times:
            return self._times[max(bisect.bisect_right(self._times, moment + TOLERANCE) - 1, 0)]
        return moment

    def _is_wanted(self, time: float) -> bool:
        """Return true if the frame of this time is shown at any moment."""
        after = bisect.bisect_right(self._times, time)
        # The first frame is shown for all moments before it, too.
        if after <= 1:
            return True
        index = bisect.bisect_left(self._moments, time - TOLERANCE)
        until = math.inf
        if after < len(self._times):
            until = self._times[after]
        return index < len(self._moments) and self._moments[index] + TOLERANCE < until
