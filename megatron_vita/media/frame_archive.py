"""Frame archives: a video as one ZIP file of image files, for clips kept as frame folders.

Format, with the usual suffix `.frames.zip`: members are stored (not compressed: images already are)
in display order, whatever their names; folders and hidden files are skipped. The comment of the
archive is the frame rate in decimal digits (`2`, `0.5`, `29.97`); without a comment it is 1. Frame
i is shown from second i / fps on.
"""

import io
import itertools
import logging
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from megatron_vita.errors import DataError
from megatron_vita.media.clip import TOLERANCE
from megatron_vita.media.files import File, is_hidden, num_bytes, opened
from megatron_vita.media.images import Pixels, read_pixels

logger = logging.getLogger(__name__)

_RATE_FILE = "fps.txt"
"""File with the frame rate of a frame folder."""
_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")


def is_archive(data: File) -> bool:
    """Return true if a video is a frame archive, by its first bytes."""
    return opened(data).read(4).startswith(_SIGNATURES)


def pack_frames(frames: Iterable[tuple[str, bytes]], fps: float) -> bytes:
    """Build a frame archive of image files (name, content) in display order.

    The same input gives the same bytes.

    Raises:
        DataError: `fps` is not positive, or there is no frame.
    """
    _require_rate(fps, repr(fps))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in frames:
            # A ZipInfo without a date gets 1980-01-01, so that bytes do not depend on the time.
            archive.writestr(zipfile.ZipInfo(name), content)
        archive.comment = repr(fps).encode()
        if not archive.infolist():
            raise DataError("no frames: a video needs at least one")
    return file.getvalue()


class FrameArchive:
    """An open frame archive of `len(archive)` frames at `fps` frames per second.

    Raises:
        DataError: naming the video by `name`: the file violates the format.
    """

    def __init__(self, data: File, name: str) -> None:
        self._name = name
        try:
            self._archive = zipfile.ZipFile(opened(data))
        except Exception as error:  # BadZipFile, ValueError, struct.error and many more
            raise DataError(
                f"{name}: cannot read this archive of frames, {num_bytes(data)} bytes: {error}"
            ) from error
        self._members = [
            member
            for member in self._archive.infolist()
            if not member.is_dir() and not is_hidden(member.filename)
        ]
        if not self._members:
            raise DataError(f"{name}: this archive of frames holds none")
        for member in self._members:
            if PurePosixPath(member.filename).name == _RATE_FILE:
                raise DataError(
                    f"{name}: {member.filename} is not a frame; the rate of an archive is its "
                    "comment (zip -z)"
                )
            if member.compress_type != zipfile.ZIP_STORED:
                raise DataError(
                    f"{name}: {member.filename} is compressed; frames must be stored (zip -0)"
                )
        self.fps = _rate(self._archive.comment, name)

    def __len__(self) -> int:
        return len(self._members)

    def show(self, times: Sequence[float], take: Callable[[int, Pixels | None], None]) -> int:
        """Call `take(index, pixels)` with the frame of each time; None as pixels repeats the one
        before.

        A frame that cannot be read is replaced by the nearest earlier one, at the start by the
        next.

        Returns:
            The number of times whose frame was replaced.

        Raises:
            DataError: no frame can be read.
        """
        shown: int | None = None
        stand_ins = 0
        lost: set[int] = set()
        for index, time in enumerate(times):
            frame = min(max(int((time + TOLERANCE) * self.fps), 0), len(self) - 1)
            # Backwards first, as for the frames of video files.
            for nearest in itertools.chain(range(frame, -1, -1), range(frame + 1, len(self))):
                if nearest == shown:
                    take(index, None)
                    break
                if nearest not in lost and (pixels := self._read(nearest)) is not None:
                    take(index, pixels)
                    shown = nearest
                    break
                lost.add(nearest)
            else:
                raise DataError(
                    f"{self._name}: none of the {len(self)} frames of this video can be read"
                )
            stand_ins += shown != frame
        return stand_ins

    def _read(self, frame: int) -> Pixels | None:
        member = self._members[frame]
        name = f"{self._name} {member.filename}"
        try:
            return read_pixels(self._archive.read(member), name)
        except DataError as error:
            logger.warning("%s", error)
        except Exception as error:  # as above
            logger.warning("%s: cannot read this frame: %s: %s", name, type(error).__name__, error)
        return None


def _rate(comment: bytes, name: str) -> float:
    """Parse the frame rate from the comment of an archive."""
    shown = comment.decode(errors="replace").strip()
    try:
        rate = float(shown or 1)
    except ValueError:
        rate = 0.0
    _require_rate(rate, f"the comment of {name}, {shown!r:.60},")
    return rate


def _require_rate(rate: float, what: str) -> None:
    if not (math.isfinite(rate) and rate > 0):
        raise DataError(f"{what} is not a rate: a positive number of frames in a second is needed")
