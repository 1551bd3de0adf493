"""Folders of media with captions, and folders of frames."""

import json
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.reading.frames import list_frames, read_frames
from megatron_vita.errors import DataError
from tests.data_tools.imports import convert, human, picture, said


def test_folders_of_captions(tmp_path: Path) -> None:
    for name, caption in (("b/1", "One."), ("a", "Two."), ("c", None), ("d", b"\xff")):
        path = tmp_path / f"set/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
        if caption:
            path.with_suffix(".txt").write_bytes(
                caption if isinstance(caption, bytes) else caption.encode()
            )
    samples, rejected = convert("captions", tmp_path / "set", "--media", str(tmp_path / "set"))
    assert samples == [
        {"messages": said("<image>\nDescribe it.", answer="Two."), "images": ["a.png"]},
        {"messages": said("<image>\nDescribe it.", answer="One."), "images": ["b/1.png"]},
    ]
    assert [entry["reason"][:10] for entry in rejected] == ["no caption", str(tmp_path)[:10]]


def test_folders_of_frames(tmp_path: Path) -> None:
    for name in ("x/one", "two", "none"):
        (tmp_path / f"set/{name}").mkdir(parents=True)
        (tmp_path / f"set/{name}/1.png").write_bytes(picture())
    (tmp_path / "set/x/one.txt").write_text("A film.")
    (tmp_path / "set/two.txt").write_text("Another.")
    samples, rejected = convert("frames", tmp_path / "set", "--media", str(tmp_path))
    assert [sample["videos"] for sample in samples] == [["set/two"], ["set/x/one"]]
    assert samples[0]["messages"][0]["content"] == "<video>\nDescribe it."
    assert [entry["place"] for entry in rejected] == [f"{tmp_path}/set/none"]


def bookkeep(folder: Path) -> None:
    """Leaves beside each file of a folder what desktops leave, with what is no picture in it."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        apart = path.parent / "__MACOSX"
        apart.mkdir(exist_ok=True)
        for copy in (path.with_name(f"._{path.name}"), apart / f"._{path.name}"):
            copy.write_bytes(b"\0\5\x16\7" + bytes(100))
    (folder / ".DS_Store").write_bytes(bytes(100))


def test_hidden_files_beside_images_and_frames_are_no_samples(tmp_path: Path) -> None:
    for kind, name in (("captions", "a"), ("frames", "film/1")):
        source = tmp_path / kind / "set"
        path = source / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture())
        (source / f"{name.split('/')[0]}.txt").write_text("A picture.")
        bookkeep(source)
        samples, rejected = convert(kind, source, "--media", str(source))
        assert [sample.get("images", sample.get("videos")) for sample in samples] == [
            ["a.png" if kind == "captions" else "film"]
        ]
        assert not rejected


def test_hidden_files_beside_sources_are_no_sources(tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    folder.mkdir()
    line = {"conversations": human("Are you there?")}
    (folder / "a.jsonl").write_text(json.dumps(line) + "\n")
    bookkeep(folder)
    samples, rejected = convert("llava", folder, "--media", str(folder))
    assert len(samples) == 1
    assert not rejected


def test_hidden_files_in_a_folder_of_frames_are_no_frames(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        (tmp_path / f"{number}.png").write_bytes(picture())
    bookkeep(tmp_path)
    assert [path.name for path in list_frames(tmp_path)] == ["1.png", "2.png", "10.png"]


def test_captions_stand_beside_media_of_every_suffix(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for name, form in (("a.AVIF", "AVIF"), ("b.jfif", "JPEG"), ("c.d.JPG", "JPEG")):
        (root / name).write_bytes(picture(format=form))
        (root / Path(name).with_suffix(".txt")).write_text(name)
    (root / "e.mp4").write_bytes(b"some film")
    (root / "e.mp4.txt").write_text("A film.")
    samples, rejected = convert("captions", root, "--media", str(root))
    assert not rejected
    media = [sample.get("images", []) + sample.get("videos", []) for sample in samples]
    assert media == [["a.AVIF"], ["b.jfif"], ["c.d.JPG"], ["e.mp4"]]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("b.image", picture(), "b.image is an image by its first bytes, but not by its suffix"),
        ("b", picture(format="JPEG"), "b is an image by its first bytes"),
        ("b.wav", b"RIFF", "b.wav holds sound"),
        ("b.raw", b"12 bits", "b.raw has a caption, but is not an image or a video"),
        ("b.heic", b"", ""),
    ],
)
def test_files_that_may_be_media_are_not_passed_over(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (root / "a.png").write_bytes(picture())
    (root / "README.md").write_text("About it.")
    (root / name).write_bytes(data)
    for stem in "ab":
        (root / f"{stem}.txt").write_text("Two.")
    samples, rejected = convert("captions", root, "--media", str(root))
    assert len(samples) == (1 if reason else 2)  # what cannot be decoded, shard refuses by name
    assert [reason in entry["reason"] for entry in rejected] == [True] * bool(reason)


def test_what_stands_beside_frames_is_used_or_refused_by_name(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "one").mkdir(parents=True)
    (root / "one/1.AVIF").write_bytes(picture(format="AVIF"))
    (root / "two.mp4").write_bytes(b"some film")
    for name in ("one", "two"):
        (root / f"{name}.txt").write_text("A film.")
    samples, _ = convert("frames", root, "--media", str(root))
    assert [sample["videos"] for sample in samples] == [["two.mp4"], ["one"]]
    assert b"1.AVIF" in read_frames(root / "one")
    (root / "one/2.jpg_").write_bytes(picture(format="JPEG"))
    with pytest.raises(DataError, match=r"2.jpg_ looks like a medium, but is not a frame"):
        read_frames(root / "one")
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.progress.jsonl").unlink()
    (root / "0.png").write_bytes(picture())
    _, rejected = convert("frames", root, "--media", str(root))
    assert "the source itself holds images" in rejected[0]["reason"]


def test_media_outside_the_media_folder_are_refused_by_name(tmp_path: Path, media: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(picture())
    (tmp_path / "set/a.txt").write_text("One.")
    samples, (entry,) = convert("captions", tmp_path / "set", "--media", str(media))
    assert not samples
    assert f"lies outside the media folder {media}" in entry["reason"]


@pytest.mark.parametrize("change", ["another", "mended", "gone"])
def test_a_folder_whose_files_changed_is_another_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"set/{name}").mkdir(parents=True)
        (tmp_path / f"set/{name}/1.png").write_bytes(picture())
        (tmp_path / f"set/{name}/1.txt").write_text("One.")
    command = ["import", "captions", str(tmp_path / "set"), "--media", str(tmp_path), "--out"]
    assert main([*command, str(tmp_path / "set/out.jsonl")]) == 0
    assert main([*command, str(tmp_path / "set/out.jsonl")]) == 0
    if change == "another":
        (tmp_path / "set/b/2.png").write_bytes(picture())
    elif change == "mended":
        (tmp_path / "set/b/1.txt").write_text("Two.")
    else:
        (tmp_path / "set/b/1.txt").unlink()
    assert main([*command, str(tmp_path / "set/out.jsonl")]) == 1
    assert "another sources" in capsys.readouterr().err
