"""A file is taken for a medium by its last suffix or its first bytes, and by nothing else."""

import base64
import io

import av
import pytest
from PIL import Image

from megatron_vita.media.data_urls import data_url, inline_content, is_inline
from megatron_vita.media.images import FORMATS
from megatron_vita.media.kinds import (
    HEAD,
    IMAGE_SUFFIXES,
    kind_of_content,
    kind_of_name,
    suffix_of_content,
)


def image(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(buffer, form)
    return buffer.getvalue()


def video(form: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for _ in range(12):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), "blue"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "image"),
        ("a.JPG", "image"),
        ("dir.png/a.seg.PNG", "image"),
        ("a..jpeg", "image"),
        ("a.avif", "image"),
        ("a.heic", "image"),
        ("a.svg", "image"),
        ("a.ts", "video"),
        ("a.Mp4", "video"),
        ("a.frames.zip", "video"),
        ("A.FRAMES.ZIP", "video"),
        ("a.wav", "audio"),
        ("a.prompts", None),
        ("a.counts", None),
        ("texts", None),
        ("ts", None),
        ("jpg", None),
        ("a.xjpg", None),
        ("a.jpg.txt", None),
        ("a.jpg.", None),
        ("a.zip", None),
        ("a.jpg/b", None),
        ("", None),
    ],
)
def test_a_suffix_is_what_follows_the_last_dot(name: str, kind: str | None) -> None:
    assert kind_of_name(name) == kind


def test_every_suffix_of_the_formats_that_are_decoded_is_an_images() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {suffix for suffix, form in known.items() if form in FORMATS} <= set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("ICO", "PPM")])
def test_images_are_told_by_their_first_bytes(form: str) -> None:
    head = image(form)[:HEAD]
    assert kind_of_content(head) == "image"
    assert kind_of_name("x" + suffix_of_content(head)) == "image"


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mov", "mpeg4"),
        ("matroska", "mpeg4"),
        ("webm", "vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
        ("flv", "flv"),
        ("asf", "mpeg4"),
    ],
)
def test_videos_are_told_by_their_first_bytes(form: str, codec: str) -> None:
    assert kind_of_content(video(form, codec)[:HEAD]) == "video"


@pytest.mark.parametrize(
    "data",
    [b"", b"BM is short for bitmap", b"GIF", b"Good " * 99, b"RIFF....", b"{}", b"PK\x03\x04", b"\xff\xd8"],
)  # fmt: skip
def test_other_files_are_no_media(data: bytes) -> None:
    assert kind_of_content(data) is None


def test_content_inside_a_text_is_found_and_read() -> None:
    data = image("PNG")
    alone = base64.b64encode(data).decode()
    for text in (data_url(data, "image"), alone, alone[:76] + "\n" + alone[76:]):
        assert is_inline(text)
        assert inline_content(text) == data
    for text in ("data:image/png,abc", "photos/a.png", "word " * 40, "a" * 400, ""):
        assert not is_inline(text)
