"""`import`: each format becomes chat JSONL that `shard` takes; bad samples are listed; a killed run
goes on."""

import json
import os
from pathlib import Path

import pytest

from data_tools.cli import main
from tests.data_tools.imports import convert, human, picture, said


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
