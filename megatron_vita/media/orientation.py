"""The orientation of an image or a video's frame, wherever its file keeps it.

Pillow gives a JPEG's Exif segments joined, of which the first one is then read, and a PNG's
metadata as far as the first pixels; turns a TIFF while it loads it; and gives an AVIF's `irot` and
`imir` as EXIF.
"""

import io
import math
import struct

import av
from PIL import ExifTags, Image

from megatron_vita.errors import DataError

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by EXIF orientation."""
_PNG_HEAD = 33
"""Bytes of a PNG's signature and its first chunk, IHDR."""
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks that may hold EXIF or XMP, in front of the pixels or behind them."""
_PNG_END = b"".join(
    struct.pack(">I4sI", 0, kind, crc)
    for kind, crc in ((b"IDAT", 0x35AF061E), (b"IEND", 0xAE426082))
)


def exif_orientation(image: Image.Image, data: bytes) -> int:
    """The orientation (1 to 8) of the opened file `data`, as it is decoded.

    1 (upright) where it is missing or damaged, and for a TIFF, which Pillow turns while loading.
    """
    if image.format == "TIFF":
        return 1
    try:
        if orientation := _orientation(image):
            return orientation
        if image.format in ("JPEG", "MPO"):
            return _of_later_segments(image)
        if image.format == "PNG":
            return _of_chunks_behind_pixels(data)
        return 1
    except Exception:  # damaged EXIF does not make the pixels worthless
        return 1


def _orientation(image: Image.Image) -> int:
    """The orientation in what Pillow has read so far; 0 where there is none."""
    # The method of the base class: that of PNG decodes all pixels in search of a late chunk.
    return _known(Image.Image.getexif(image))


def _known(exif: Image.Exif) -> int:
    orientation = exif.get(ExifTags.Base.Orientation, 0)
    if orientation == 1 or orientation in UPRIGHT:
        return orientation
    return 0


def _of_later_segments(image: Image.Image) -> int:
    """The orientation of a JPEG whose first Exif segment has none: of the next one that has."""
    segments = [
        content
        for kind, content in getattr(image, "applist", ())
        if kind == "APP1" and content.startswith(b"Exif\0\0")
    ]
    for segment in segments[1:]:
        exif = Image.Exif()
        exif.load(segment)
        if orientation := _known(exif):
            return orientation
    return 1


def _of_chunks_behind_pixels(data: bytes) -> int:
    """The orientation of a PNG whose metadata stand behind its pixels."""
    late = b"".join(_late_metadata(data))
    if not late:
        return 1
    with Image.open(io.BytesIO(data[:_PNG_HEAD] + late + _PNG_END), formats=("PNG",)) as head:
        return _orientation(head) or 1


def _late_metadata(data: bytes) -> list[bytes]:
    """The chunks of metadata behind the first pixels of a PNG."""
    chunks = []
    place = _PNG_HEAD
    is_late = False
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        is_late = is_late or kind == b"IDAT"
        end = place + 12 + length
        if is_late and kind in _PNG_METADATA:
            chunks.append(data[place:end])
        place = end
    return chunks


def frame_orientation(frame: av.VideoFrame) -> int:
    """The EXIF orientation (1 to 8) that a frame's display matrix means, as `ffmpeg -autorotate`.

    The matrix is of the container or of the codec (H.264's and HEVC's display orientation). One
    that is singular turns nothing.

    Raises:
        DataError: the matrix turns by another angle than 0, 90, 180 or 270 degrees, rounded.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 1
    # ISO 14496-12: a point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=9i", bytes(side_data))[:5]
    if not (a or c) or not (b or d):
        return 1
    angle = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))) % 360
    if angle == 0:
        if d < 0:
            return 4
        return 1
    if angle == 90:
        if c > 0:
            return 5
        return 6
    if angle == 180:
        return _flipped(sideways=a < 0, upside_down=d < 0)
    if angle == 270:
        if c < 0:
            return 7
        return 8
    raise DataError(f"its display matrix turns by {angle} degrees: a multiple of 90 is needed")


def _flipped(*, sideways: bool, upside_down: bool) -> int:
    if sideways:
        if upside_down:
            return 3
        return 2
    if upside_down:
        return 4
    return 1
