"""A seeded source of hostile inputs: lines of JSONL with their media, and tars; the same seed gives
the same ones."""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.data_tools.fuzz_media import File, damaged, images, videos

NAMES = (
    "../out.jpg",
    "/etc/out.jpg",
    "a/../../out.jpg",
    "\udcfe.jpg",
    "x" * 300 + ".jpg",
    ".jpg",
    "a",
    "a/",
    "./0.jpg",
)
LINKS = {
    "symbolic": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "device": tarfile.CHRTYPE,
}
HUGE_LINE = 100_000_000


class Line(NamedTuple):
    """A line of a JSONL file, and the files that it names."""

    text: bytes
    media: dict[str, bytes]


def write_lines(path: Path, media: Path, *, count: int, seed: int, huge: bool) -> int:
    """Writes about `count` lines and their media; gives the number of lines that are not empty."""
    media.mkdir(parents=True)
    written = 0
    with open(path, "wb") as file:
        for line in lines(count, seed, huge=huge):
            for name, data in line.media.items():
                (media / name).write_bytes(data)
            text = line.text.replace(b"\n", b" ")
            file.write(text + b"\n")
            written += bool(text.strip())
    return written


def lines(count: int, seed: int, *, huge: bool) -> Iterator[Line]:
    """Every odd medium and every odd line once, then damaged ones; good ones stand between."""
    dice = random.Random(seed)
    number = 0
    for kind, files in (("image", images()), ("video", videos())):
        for file in files.values():
            yield _line_of(kind, file, number)
            number += 1
    for text in odd_texts(dice, huge=huge):
        yield Line(text, {})
        number += 1
    while number < count:
        kind, files = dice.choice((("image", images()), ("image", images()), ("video", videos())))
        suffix, data = dice.choice([file for file in files.values() if 0 < len(file[1]) < 100_000])
        chance = dice.random()
        line = _line_of(kind, (suffix, data if chance < 0.05 else damaged(data, dice)), number)
        yield line._replace(text=damaged(line.text, dice)) if chance > 0.85 else line
        number += 1


def _line_of(kind: str, file: File, number: int) -> Line:
    name = f"{number}{file[0]}"
    return Line(json.dumps(talk(kind, name), ensure_ascii=False).encode(), {name: file[1]})


def talk(kind: str, *names: Any) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"<{kind}>" * len(names) + "Hm?"},
        {"role": "assistant", "content": "Yes."},
    ]
    return {"messages": turns, f"{kind}s": list(names)}


def odd_texts(dice: random.Random, *, huge: bool) -> Iterator[bytes]:
    """Lines that are not what they should be, or only just."""
    whole = talk("image", "0.png")
    yield from (
        b"\xff\xfe{}",
        b"\0",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"{}",
        b"\xef\xbb\xbf" + json.dumps(whole).encode(),
    )
    yield b"[" * 100_000
    yield b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    yield b'{"text": ' + b"9" * 10_000 + b"}"
    yield json.dumps(whole).encode("utf-16")
    yield json.dumps(whole).replace("Hm?", "Caf\xe9").encode("latin-1")
    yield from (
        json.dumps(whole | {"weight": value}).encode()
        for value in (-1, float("nan"), float("inf"), "x", None, 2)
    )
    values: tuple[Any, ...] = (None, 7, "x", [], {}, [[]], [None], [{}], float("nan"), "\ud800")
    for value in (*values, -(10**30)):
        for field in ("messages", "images", "videos", "text", "id", "conversations"):
            yield json.dumps(whole | {field: value}).encode()
        yield json.dumps({"text": value}).encode()
        for field in ("role", "content"):
            turns = [whole["messages"][0] | {field: value}, whole["messages"][1]]
            yield json.dumps(whole | {"messages": turns}).encode()
    for name in (
        "../lines.jsonl",
        "/etc/hostname",
        "none.png",
        ".",
        "..",
        "",
        "a\0b",
        "x" * 5000,
        "~",
        "0.png/",
        "//0.png",
    ):
        yield json.dumps(talk("image", name)).encode()
        yield json.dumps(talk("video", name)).encode()
    yield json.dumps(talk("image", *["0.png"] * 50)).encode()
    yield b" " * 1000 + json.dumps({"text": "A text. " * dice.randrange(1, 2000)}).encode()
    if huge:
        yield json.dumps({"notes": "x" * HUGE_LINE, "text": "A short text."}).encode()
        yield b'{"text": "' + b"y" * HUGE_LINE


def write_tars(folder: Path, *, count: int, seed: int) -> list[Path]:
    """Writes about `count` hostile tars."""
    folder.mkdir(parents=True)
    paths = []
    for i, data in enumerate(tars(count, seed)):
        paths.append(folder / f"t-{i:06d}.tar")
        paths[-1].write_bytes(data)
    return paths


def tars(count: int, seed: int) -> Iterator[bytes]:
    """Odd tars, then damaged ones."""
    dice = random.Random(seed)
    whole = tar_of(good_members())
    yield from (
        b"",
        b"text",
        bytes(512),
        bytes(1024),
        bytes(10240),
        whole[:-1024],
        whole + b"x",
        b"\x1f\x8b" + whole,
    )
    yield from (tar_of([*good_members(), (name, b"x", {})]) for name in NAMES)
    for kind in LINKS.values():
        yield tar_of(
            [
                ("1.jpg", b"", {"type": kind, "linkname": "/etc/hostname"}),
                ("1.txt", b"A link.", {}),
                *good_members(),
            ]
        )
    yield tar_of([*good_members(), *good_members()])
    yield tar_of([*good_members(), ("0.txt", b"Again.", {})])
    yield tar_of([(f"{i}{suffix}", data, {}) for i, (suffix, data) in enumerate(images().values())])
    for suffix, data in [*images().values(), *videos().values()]:
        yield tar_of([("0" + suffix, data, {}), ("0.txt", b"A caption.", {}), *good_members("9")])
    for text in odd_texts(dice, huge=False):
        yield tar_of(
            [("0.png", images()["plain"][1], {}), ("0.json", text, {}), *good_members("9")]
        )
    for size in (-1, -512, 2**40, 2**62):
        yield resized(whole, size)
    number = 0
    while number < count:
        yield damaged(whole, dice) if dice.random() < 0.5 else with_damaged_header(whole, dice)
        number += 1


def good_members(key: str = "0") -> list[tuple[str, bytes, dict[str, Any]]]:
    """Three samples, the second with a record of its own making, the third a video."""
    record = talk("image", "b.image0.png")
    own = json.dumps(record | {"images": [f"{key}b.image0.png"], "videos": []}).encode()
    return [
        (f"{key}.jpg", images()["baseline"][1], {}),
        (f"{key}.txt", b"A caption.", {}),
        (f"{key}b.json", own, {}),
        (f"{key}b.image0.png", images()["plain"][1], {}),
        (f"{key}c.mp4", videos()["mp4"][1], {}),
        (f"{key}c.json", b'{"caption": "A film."}', {}),
    ]


def tar_of(members: list[tuple[str, bytes, dict[str, Any]]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def resized(data: bytes, size: int) -> bytes:
    """A tar whose first header tells another size."""
    return with_header(data, 124, size.to_bytes(12, "big", signed=True))


def with_damaged_header(data: bytes, dice: random.Random) -> bytes:
    """A tar with a byte of its first header changed, the checksum fitting, or a byte of any
    block."""
    if dice.random() < 0.5:
        return with_header(data, dice.randrange(512), dice.randbytes(1))
    harmed = bytearray(data)
    harmed[dice.randrange(len(harmed))] ^= 0xFF
    return bytes(harmed)


def with_header(data: bytes, place: int, value: bytes) -> bytes:
    """A tar with something else in its first header, whose checksum fits."""
    header = bytearray(data[:512])
    header[place : place + len(value)] = value
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:]
