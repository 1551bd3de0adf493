"""Orientation of images and video frames, wherever the file stores it.

Pillow joins the Exif segments of a JPEG and reads the first; reads a PNG's metadata up to the first
pixels; turns a TIFF while it loads it; and reports an AVIF's `irot` and `imir` as EXIF.
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
"""Transpose operation that turns an image upright, by EXIF orientation."""
_PNG_HEAD = 33
"""Bytes of a PNG's signature and its first chunk, IHDR."""
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks that may hold EXIF or XMP, before or after the pixels."""
_PNG_END = b"".join(
    struct.pack(">I4sI", 0, kind, crc)
    for kind, crc in ((b"IDAT", 0x35AF061E), (b"IEND", 0xAE426082))
)


def exif_orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation (1 to 8) of the opened file `data`, relative to its decoded pixels.

    It is 1 (upright) if it is missing or damaged, and for a TIFF, which Pillow turns while loading.
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
    except Exception:
        # Parsers of EXIF raise anything on damaged data, which leaves the pixels usable.
        return 1


def _orientation(image: Image.Image) -> int:
    """Orientation in the metadata that Pillow has read so far; 0 if there is none."""
    # The base class's method: the one of PNG decodes all pixels to find metadata after them.
    return _known(Image.Image.getexif(image))


def _known(exif: Image.Exif) -> int:
    orientation = exif.get(ExifTags.Base.Orientation, 0)
    if orientation == 1 or orientation in UPRIGHT:
        return orientation
    return 0


def _of_later_segments(image: Image.Image) -> int:
    """Orientation of a JPEG whose first Exif segment has none: the first of the later segments."""
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
    """Orientation of a PNG whose metadata chunks follow its pixels."""
    late = b"".join(_late_metadata(data))
    if not late:
        return 1
    # Pillow parses metadata before the pixels without decoding: give it a PNG of the header, the
    # late chunks and no pixels.
    with Image.open(io.BytesIO(data[:_PNG_HEAD] + late + _PNG_END), formats=("PNG",)) as head:
        return _orientation(head) or 1


def _late_metadata(data: bytes) -> list[bytes]:
    """Collect the metadata chunks that follow the first pixels of a PNG."""
    chunks = []
    offset = _PNG_HEAD
    is_late = False
    # A chunk is its length, kind, content and CRC: 12 bytes and the content.
    while offset + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        is_late = is_late or kind == b"IDAT"
        end = offset + 12 + length
        if is_late and kind in _PNG_METADATA:
            chunks.append(data[offset:end])
        offset = end
    return chunks


def frame_orientation(frame: av.VideoFrame) -> int:
    """EXIF orientation (1 to 8) of a frame's display matrix, as `ffmpeg -autorotate` applies it.

    The matrix is the container's or the codec's (display orientation of H.264 and HEVC). A singular
    one is ignored.

    Raises:
        DataError: the matrix turns by an angle other than 0, 90, 180 or 270 degrees, rounded.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 1
    # ISO 14496-12: a point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=9i", bytes(side_data))[:5]
    # A zero row collapses the picture: no angle can be computed.
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
