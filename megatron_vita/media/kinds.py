"""Kinds of media files, by the suffix of the name or by the first bytes.

Suffixes of formats that cannot be decoded here are known too, so that such a file is refused by
name instead of being skipped.
"""

from typing import Literal

MediaKind = Literal["image", "video", "audio"]

FRAMES_SUFFIX = ".frames.zip"
"""Suffix of a frame archive, which is a video."""
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".ico"),
    *(".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
)
"""Suffixes of images that can be decoded."""
OTHER_IMAGE_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".svg", ".tga", ".psd", ".dds", ".exr", ".hdr"),
    *(".eps", ".dng", ".cr2", ".nef", ".arw", ".rw2"),
)
"""Suffixes of images that cannot be decoded, which are refused by name."""
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m2v"),
    *(".ts", ".mts", ".m2ts", ".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".vob"),
    *(".dv", ".mxf", ".divx", ".rm", ".rmvb", ".y4m", ".h264", ".264", ".h265", ".hevc"),
    FRAMES_SUFFIX,
)
AUDIO_SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aiff")
HEAD = 512
"""Bytes at the beginning of a file that are needed to find its kind."""

_SUFFIXES: dict[str, MediaKind] = {
    **dict.fromkeys((*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES), "image"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys(AUDIO_SUFFIXES, "audio"),
}
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF87a", ".gif"),
    (b"GIF89a", ".gif"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"\0\0\0\x0cjP  \r\n", ".jp2"),
    (b"\0\0\0\x0cJXL \r\n", ".jxl"),
    (b"8BPS\0\x01", ".psd"),
    (b"\x1aE\xdf\xa3", ".mkv"),
    (b"FLV\x01", ".flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ".wmv"),
    (b"\0\0\x01\xba", ".mpg"),
    (b"OggS\0", ".ogg"),
    (b"fLaC", ".flac"),
    (b"ID3", ".mp3"),
)
_RIFF = {b"WEBP": ".webp", b"AVI ": ".avi", b"WAVE": ".wav"}
_STILL_BRANDS = {b"avif": ".avif", b"avis": ".avif", b"heic": ".heic", b"heix": ".heic"}
_STILL_BRANDS |= {b"mif1": ".heic", b"msf1": ".heic", b"hevc": ".heic"}
_AUDIO_BRANDS = {b"M4A ": ".m4a", b"M4B ": ".m4a"}
_PACKET = 188  # bytes of a packet of an MPEG transport stream


def kind_of_name(name: str) -> MediaKind | None:
    """Kind of a file by its suffix, in any case; None if the suffix is of no medium."""
    name = name.rpartition("/")[2].lower()
    if name.endswith(FRAMES_SUFFIX):
        return "video"
    _, dot, suffix = name.rpartition(".")
    return _SUFFIXES.get(dot + suffix)


def suffix_of_content(head: bytes) -> str:
    """Usual suffix of a file, with the dot, by its first `HEAD` bytes; empty if unknown."""
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return _STILL_BRANDS.get(brand) or _AUDIO_BRANDS.get(brand) or ".mp4"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return ".bmp"
    # Transport streams have no signature but a sync byte G in every packet: look at three.
    if len(head) > 2 * _PACKET and not head[: 2 * _PACKET + 1 : _PACKET].strip(b"G"):
        return ".ts"
    return next((suffix for magic, suffix in _SIGNATURES if head.startswith(magic)), "")


def kind_of_content(head: bytes) -> MediaKind | None:
    """Kind of a file by its first `HEAD` bytes; None if they are of no known medium."""
    return _SUFFIXES.get(suffix_of_content(head))
