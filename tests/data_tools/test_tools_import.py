"""`import`: each format becomes chat JSONL that `shard` takes; bad samples are listed; a killed run
goes on."""

import io
import json
import os
import resource
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.formats import objects
from data_tools.frames import list_frames, read_frames
from megatron_vita.errors import DataError


def picture(color: str = "red", format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(picture())
    (folder / "film.mp4").write_bytes(b"some film")
    return folder


def convert(
    format: str, source: Path, *options: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples and the rejections that `import` makes of a source."""
    root = source.parent
    out = root / "out.jsonl"
    code = main(["import", format, str(source), "--out", str(out), "--workers", "1", *options])
    samples = read(out)
    rejected = read(root / "out.rejected.jsonl")
    assert code == (1 if rejected and not samples else 0)
    return samples, rejected


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def human(text: str, *, answer: str = "Yes.") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def said(text: str, *, answer: str = "Yes.") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def test_llava_images_videos_and_text(tmp_path: Path, media: Path) -> None:
    found = [
        {"id": "x", "image": "a.png", "conversations": human("<image>\nRed?")},
        {"image": ["a.png", "b.png"], "conversations": human("Which of <image> and <image>?")},
        {"image": "a.png", "conversations": human("No tag.")},
        {"video": "film.mp4", "conversations": human("<image>\nWhat happens?")},
        {"conversations": human("Just words.", answer="An <image> tag.")},
    ]
    (tmp_path / "set.json").write_text(json.dumps(found, indent=1))
    samples, rejected = convert("llava", tmp_path / "set.json", "--media", str(media))
    assert not rejected
    assert samples == [
        {"id": "x", "messages": said("<image>\nRed?"), "images": ["a.png"]},
        {"messages": said("Which of <image> and <image>?"), "images": ["a.png", "b.png"]},
        {"messages": said("<image>\nNo tag."), "images": ["a.png"]},
        {"messages": said("<video>\nWhat happens?"), "videos": ["film.mp4"]},
        {"messages": said("Just words.", answer="An <image> tag.")},
    ]


def test_llava_lines_are_read_too(tmp_path: Path, media: Path) -> None:
    lines = [
        {"image": "a.png", "conversations": human("<image>")},
        {"image": "b.png", "conversations": human("Hm?")},
    ]
    (tmp_path / "set.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    samples, _ = convert("llava", tmp_path / "set.jsonl", "--media", str(media))
    assert [sample["images"] for sample in samples] == [["a.png"], ["b.png"]]


BAD = {
    "absolute path": (
        {"image": "/etc/passwd", "conversations": human("<image>")},
        "lies outside the media folder",
    ),
    "parent folder": (
        {"image": "../x.png", "conversations": human("<image>")},
        "lies outside the media folder",
    ),
    "link outside": (
        {"image": "link.png", "conversations": human("<image>")},
        "is a link to outside",
    ),
    "missing file": ({"image": "no.png", "conversations": human("<image>")}, "no such file"),
    "no path": ({"image": 7, "conversations": human("<image>")}, "image is 7"),
    "path with a zero byte": ({"image": "a\0b", "conversations": human("<image>")}, "not a path"),
    "name too long": ({"image": "a" * 5000, "conversations": human("<image>")}, "not a path"),
    "tags and paths differ": (
        {"image": "a.png", "conversations": human("<image><image>")},
        "2 places for images",
    ),
    "unknown role": ({"conversations": [{"from": "dog", "value": "Wuff"}]}, "role is 'dog'"),
    "no answer": ({"conversations": human("Hm?")[:1]}, "no assistant turn"),
    "no conversation": ({"image": "a.png"}, "a list of turns is needed"),
    "turn without text": ({"conversations": [{"from": "human"}]}, "turn 0 has ['from']"),
    "lone surrogate": ({"conversations": human("\ud800")}, "lone surrogate"),
    "id with a surrogate": (
        {"id": "\udfff", "conversations": human("Hm?")},
        "surrogates not allowed",
    ),
    "not an object": ([1, 2], "a list, not a JSON object"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_bad_sample_is_listed_with_its_place_and_the_others_are_used(
    tmp_path: Path, media: Path, bad: str, suffix: str
) -> None:
    found, reason = BAD[bad]
    (media / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "secret.png").write_bytes(picture())
    objects = [{"conversations": human("One?")}, found, {"conversations": human("Three?")}]
    text = json.dumps(objects) if suffix == ".json" else "\n".join(map(json.dumps, objects))
    (tmp_path / f"set{suffix}").write_text(text)
    samples, rejected = convert("llava", tmp_path / f"set{suffix}", "--media", str(media))
    assert [sample["messages"][0]["content"] for sample in samples] == ["One?", "Three?"]
    (entry,) = rejected
    assert entry["place"] == ("object 2" if suffix == ".json" else "line 2")
    assert reason in entry["reason"]


def test_a_broken_array_gives_what_stands_before_the_break(tmp_path: Path) -> None:
    text = json.dumps([{"conversations": human(f"{i}?")} for i in range(100)])
    (tmp_path / "set.json").write_text(text[:-3000])
    samples, (entry,) = convert("llava", tmp_path / "set.json")
    assert 0 < len(samples) < 100
    assert entry["place"] == "the rest"
    assert f"malformed after object {len(samples)}: the file ends within it" in entry["reason"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_arrays_are_split_where_their_items_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(objects, "CHUNK", chunk)
    items = [{"a": ']}\\"'}, {"b": [{"c": ","}, []]}, {"d": "\\\\"}, {"é": "😀"}, {}]
    for indent, ascii_only in ((None, True), (2, False)):
        text = json.dumps(items, indent=indent, ensure_ascii=ascii_only) + "\n"
        (tmp_path / "set.json").write_bytes(b"\xef\xbb\xbf \n" + text.encode())
        found = [
            candidate.make() for candidate in objects.read_objects(tmp_path / "set.json", dict)
        ]
        assert found == items


@pytest.mark.parametrize(
    ("text", "samples", "reason"),
    [
        ('[{"a": }, {"b": 1}]', 1, "not JSON"),
        ("[3, {}]", 1, "a int, not a JSON object"),
        ("[{},]", 1, ""),
        ("[{}] x", 1, "b'x' follows its end"),
        ('[{"a": "\xff"}, {}]', 1, "not JSON"),
        ("[]", 0, ""),
    ],
)
def test_what_is_no_object_is_one_bad_sample(
    tmp_path: Path, text: str, samples: int, reason: str
) -> None:
    (tmp_path / "set.json").write_bytes(text.encode("latin-1"))
    found = 0
    reasons = ""
    try:
        for candidate in objects.read_objects(tmp_path / "set.json", dict):
            try:
                candidate.make()
                found += 1
            except DataError as error:
                reasons += str(error)
    except DataError as error:
        reasons += str(error)
    assert found == samples
    assert reason in reasons


def test_a_long_array_needs_no_memory_for_all_of_it(tmp_path: Path) -> None:
    with open(tmp_path / "set.json", "w") as file:
        file.write(
            "[" + ",".join(json.dumps({"n": i, "pad": "x" * 10000}) for i in range(10000)) + "]"
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in objects.read_objects(tmp_path / "set.json", dict)) == 10000
    # kilobytes, of 100 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_sharegpt_keeps_systems_and_takes_tags_literally_where_there_are_no_media(
    tmp_path: Path, media: Path
) -> None:
    found = [
        {"system": "Be brief.", "conversations": human("What does <image> do in HTML?")},
        {"conversations": human("<image>Hm?"), "images": ["a.png"]},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"}]},
        {"messages": said("c")},
    ]
    (tmp_path / "set.json").write_text(json.dumps(found))
    samples, rejected = convert("sharegpt", tmp_path / "set.json", "--media", str(media))
    assert not rejected
    system = {"role": "system", "content": "Be brief."}
    assert samples[0] == {"messages": [system, *said("What does \\<image> do in HTML?")]}
    assert samples[1] == {"messages": said("<image>Hm?"), "images": ["a.png"]}
    assert [turn["role"] for turn in samples[2]["messages"]] == ["user", "assistant"]
    assert samples[3] == {"messages": said("c")}


ROWS = [
    {
        "images": [{"bytes": picture(), "path": None}],
        "texts": [{"user": "Which?", "assistant": "Red."}],
    },
    {
        "images": [{"bytes": picture("blue", "JPEG"), "path": "x.jpg"}] * 2,
        "texts": [{"user": "Two?", "assistant": "Yes"}],
    },
    {
        "images": [{"bytes": None, "path": "a.png"}],
        "texts": [{"user": "By path?", "assistant": "Yes"}],
    },
    {
        "images": [{"bytes": None, "path": "../a.png"}],
        "texts": [{"user": "Outside?", "assistant": "Yes"}],
    },
    {"images": [], "texts": [{"user": "Words?", "assistant": "Yes"}]},
    {"images": None, "texts": None},
]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_hugging_face_folders_with_images_inside(tmp_path: Path, media: Path, kind: str) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / f"set/data/train-0.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(
            str(path), table.schema
        ) as writer:
            writer.write_table(table)
    out = tmp_path / "found"
    samples, rejected = convert(
        "hf", tmp_path / "set", "--media", str(media), "--media-out", str(out)
    )
    assert [len(sample.get("images", [])) for sample in samples] == [1, 2, 1, 0]
    assert samples[0]["messages"] == said("<image>\nWhich?", answer="Red.")
    assert [(out / name).read_bytes()[:4] for name in samples[1]["images"]] == [
        b"\xff\xd8\xff\xe0"
    ] * 2
    assert (out / samples[2]["images"][0]).read_bytes() == (media / "a.png").read_bytes()
    assert [entry["place"] for entry in rejected] == ["row 4", "row 6"]


def test_hugging_face_captions_and_questions(tmp_path: Path) -> None:
    image = {"bytes": picture(), "path": None}
    pq.write_table(
        pa.Table.from_pylist([{"image": image, "caption": " A red one. "}]), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.Table.from_pylist([{"image": image, "question": "Which?", "answer": "Red."}]),
        tmp_path / "b.parquet",
    )
    pq.write_table(pa.Table.from_pylist([{"image": image, "label": 3}]), tmp_path / "c.parquet")
    (tmp_path / "set").mkdir()
    for name in "abc":
        os.rename(tmp_path / f"{name}.parquet", tmp_path / f"set/{name}.parquet")
    samples, rejected = convert(
        "hf", tmp_path / "set", "--media-out", str(tmp_path / "found"), "--prompt", "Say."
    )
    assert samples[0]["messages"] == said("<image>\nSay.", answer="A red one.")
    assert samples[1]["messages"] == said("<image>\nWhich?", answer="Red.")
    assert "no text among the columns ['image', 'label']" in rejected[0]["reason"]


def test_sources_of_one_name_keep_their_own_media(tmp_path: Path) -> None:
    for name, color in (("en", "red"), ("de", "blue")):
        (tmp_path / f"set/{name}").mkdir(parents=True)
        row = {"image": {"bytes": picture(color, "BMP"), "path": None}, "caption": color}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"set/{name}/train-0.parquet")
    out = tmp_path / "found"
    samples, _ = convert("hf", tmp_path / "set", "--media-out", str(out))
    found = {
        sample["messages"][1]["content"]: (out / sample["images"][0]).read_bytes()
        for sample in samples
    }
    assert found == {color: picture(color, "BMP") for color in ("red", "blue")}


def test_a_medium_of_an_earlier_import_gives_way_to_another_of_its_size(tmp_path: Path) -> None:
    out = tmp_path / "found"
    for color in ("red", "blue"):
        row = {"image": {"bytes": picture(color, "BMP"), "path": None}, "caption": color}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set.parquet")
        (sample,), _ = convert("hf", tmp_path / "set.parquet", "--media-out", str(out))
        assert (out / sample["images"][0]).read_bytes() == picture(color, "BMP")
        for path in tmp_path.glob("out.*"):
            path.unlink()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tars(tmp_path: Path) -> None:
    chat = json.dumps(human("<image>\nRed?")).encode()
    path = write_tar(
        tmp_path / "set.tar",
        {
            "a/0.jpg": picture(format="JPEG"),
            "a/0.txt": b"A red one.\n",
            "a/1.png": picture(),
            "a/1.json": b'{"caption": "Also red.", "width": 40}',
            "a/2.jpg": picture(),
            "a/2.json": chat,
            "a/3.jpg": picture(),
            "../4.jpg": picture(),
            "../4.txt": b"Out.",
        },
    )
    out = tmp_path / "found"
    samples, rejected = convert("webdataset", path, "--media-out", str(out), "--prompt", "Say.")
    assert [sample["id"] for sample in samples] == ["a/0", "a/1", "a/2"]
    assert samples[0]["messages"] == said("<image>\nSay.", answer="A red one.")
    assert samples[1]["messages"] == said("<image>\nSay.", answer="Also red.")
    assert samples[2]["messages"] == said("<image>\nRed?")
    assert (out / samples[0]["images"][0]).read_bytes() == picture(format="JPEG")
    assert [entry["place"] for entry in rejected] == ["sample a/3", "sample ../4"]
    assert "no text among ['jpg']" in rejected[0]["reason"]
    assert "leads out of the folder" in rejected[1]["reason"]
    assert {path.name for path in tmp_path.iterdir()} >= {"found", "set.tar"}
    assert not (tmp_path.parent / "4.jpg").exists()


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


def test_fields_can_be_passed_over(tmp_path: Path, media: Path) -> None:
    record = {"image": "a.png", "thumb": "b.png", "conversations": human("Red?")}
    (tmp_path / "set.json").write_text(json.dumps([record]))
    samples, rejected = convert("llava", tmp_path / "set.json", "--media", str(media))
    assert not samples
    assert "thumb is 'b.png', which looks like a medium" in rejected[0]["reason"]
    for path in tmp_path.glob("out.*"):
        path.unlink()
    command = ("--media", str(media), "--ignore", "thumb", "--ignore", "mask")
    samples, _ = convert("llava", tmp_path / "set.json", *command)
    assert samples == [{"messages": said("<image>\nRed?"), "images": ["a.png"]}]


def test_a_time_that_cannot_be_told_costs_no_sample(tmp_path: Path) -> None:
    image = {"bytes": picture(), "path": None}
    table = pa.Table.from_pylist([{"image": image, "caption": "A red one."}] * 2)
    times = pa.array([1, 2**62], pa.timestamp("us"))
    pq.write_table(table.append_column("taken", times), tmp_path / "set.parquet")
    samples, _ = convert("hf", tmp_path / "set.parquet", "--media-out", str(tmp_path / "found"))
    assert len(samples) == 2


def test_the_prompt_of_a_members_file_is_asked_unless_another_is_given(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", {"0.jpg": picture(format="JPEG"), "0.txt": b"Red."})
    (tmp_path / "members.yaml").write_text("prompt: Which?\n")
    out = ("--media-out", str(tmp_path / "found"))
    samples, _ = convert("webdataset", path, *out)
    assert samples[0]["messages"] == said("<image>\nWhich?", answer="Red.")
    for file in tmp_path.glob("out.*"):
        file.unlink()
    samples, _ = convert("webdataset", path, *out, "--prompt", "Say.")
    assert samples[0]["messages"] == said("<image>\nSay.", answer="Red.")


def test_sources_are_found_in_letters_of_any_case(tmp_path: Path, media: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/TRAIN.JSON").write_text(json.dumps([{"conversations": human("One?")}]))
    samples, _ = convert("llava", tmp_path / "set", "--media", str(media))
    assert len(samples) == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{media}/a.png", "is absolute: a path from"),
        ("x/../a.png", "has .. in it"),
        ("https://x.org/a.png", "is a URL"),
        ("folder/a.png", "lies in a folder that is a link to outside"),
    ],
)
def test_reasons_are_true(tmp_path: Path, media: Path, path: str, reason: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(picture())
    (media / "folder").symlink_to(tmp_path / "other")
    record = {"image": path.format(media=media), "conversations": human("<image>")}
    (tmp_path / "set.json").write_text(json.dumps([record]))
    _, (entry,) = convert("llava", tmp_path / "set.json", "--media", str(media))
    assert reason in entry["reason"]


def test_media_outside_the_media_folder_are_refused_by_name(tmp_path: Path, media: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(picture())
    (tmp_path / "set/a.txt").write_text("One.")
    samples, (entry,) = convert("captions", tmp_path / "set", "--media", str(media))
    assert not samples
    assert f"lies outside the media folder {media}" in entry["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "x.json", "--out", "o.jsonl"], "format 'coco'; known: llava, sharegpt, hf"),
        (["llava", "no.json", "--out", "o.jsonl"], "no.json: there is no such file"),
        (["llava", "x.json", "--out", "o.txt"], "--out o.txt: the name must end in .jsonl"),
        (["llava", "x.json", "--out", "o.jsonl", "--media", "no"], "--media no is not a folder"),
        (["hf", "x.json", "--out", "o.jsonl"], "--media-out"),
        (["captions", "x.json", "--out", "o.jsonl"], "x.json is not a folder"),
        (["llava", "empty", "--out", "o.jsonl"], "empty: no file with .json or .jsonl"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("[]")
    Path("empty").mkdir()
    assert main(["import", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_finished_sources_are_not_read_again_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"conversations": human("One?")}))
    convert("llava", tmp_path / "set.jsonl")
    before = os.stat(tmp_path / "out.jsonl").st_mtime_ns
    convert("llava", tmp_path / "set.jsonl")
    assert os.stat(tmp_path / "out.jsonl").st_mtime_ns == before
    (tmp_path / "set.jsonl").write_text("{}")
    assert (
        main(["import", "llava", str(tmp_path / "set.jsonl"), "--out", str(tmp_path / "out.jsonl")])
        == 1
    )
    assert "another sources" in capsys.readouterr().err


def test_a_result_of_which_nothing_tells_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"conversations": human("One?")}))
    convert("llava", tmp_path / "set.jsonl")
    (tmp_path / "set.jsonl").write_text(json.dumps({"conversations": human("Two?")}))
    (tmp_path / "out.progress.jsonl").unlink()
    before = (tmp_path / "out.jsonl").read_bytes()
    assert (
        main(["import", "llava", str(tmp_path / "set.jsonl"), "--out", str(tmp_path / "out.jsonl")])
        == 1
    )
    assert "out.jsonl: it exists, but" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not (tmp_path / "out.parts").exists()
    (tmp_path / "out.jsonl").unlink()
    samples, _ = convert("llava", tmp_path / "set.jsonl")
    assert samples[0]["messages"] == said("Two?")


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


def test_what_import_writes_shard_takes(tmp_path: Path, media: Path) -> None:
    (tmp_path / "set.json").write_text(
        json.dumps([{"image": "a.png", "conversations": human("<image>")}] * 3)
    )
    convert("llava", tmp_path / "set.json", "--media", str(media))
    assert (
        main(
            [
                "shard",
                str(tmp_path / "out.jsonl"),
                "--media",
                str(media),
                "--out",
                str(tmp_path / "toy"),
            ]
        )
        == 0
    )
    assert (tmp_path / "toy/rejected.jsonl").read_text() == ""


@pytest.mark.parametrize(("share", "code"), [("0.6", 0), ("0.5", 0), ("0.49", 1), ("0", 1)])
def test_more_rejected_samples_than_allowed_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str, code: int
) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"what": 1}) + "\n")
    out = tmp_path / "out.jsonl"
    command = ["import", "llava", f"{tmp_path}/a.jsonl", "--out", str(out), "--workers", "0"]
    assert main([*command, "--max-rejected", share]) == code
    assert len(out.read_text().splitlines()) == 1
    told = "1 of 2 samples (50.00%) rejected, more than --max-rejected"
    assert (told in capsys.readouterr().err) == bool(code)
