"""Sources that hold their media: tables of Parquet or Arrow, and tars of webdataset."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_tools.imports import convert, human, picture, said, write_tar

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
