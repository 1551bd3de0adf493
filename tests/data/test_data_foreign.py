"""Shards made by others: their members become conversations, by a rule; ours stay what they are."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_tools.reading.members import describe_members
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.planning.plan import write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.samples.foreign_turns import place_media, read_chat
from megatron_vita.data.samples.third_party import (
    MemberRule,
    read_rule,
    record_of_members,
)
from megatron_vita.data.shards.index import read_index, text_stamp
from megatron_vita.data.shards.index_build import build_index, build_sound_index
from megatron_vita.data.shards.quarantine import (
    Entry,
    Quarantine,
    quarantine_path,
    read_quarantine,
    write_quarantine,
)
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia, scan_shard
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer_base import Tokenizer
from tests.data.toy_data import picture, talk, toy_recipe, write_shard
from tests.indexes import index_of, index_shard

CAPTIONED = {"0.jpg": picture((40, 40), "red", format="JPEG"), "0.txt": b"A red square."}


def write_tar(path: Path, files: dict[str, bytes], **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "a" if path.exists() else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def record(files: dict[str, bytes], **rule: Any) -> dict:
    return record_of_members(list(files), files.__getitem__, rule=MemberRule(**rule))


def test_a_caption_answers_the_prompt() -> None:
    found = record(CAPTIONED, prompt="What is <image>?")
    assert found["images"] == ["0.jpg"]
    assert [turn["content"] for turn in found["messages"]] == [
        "<image>\nWhat is \\<image>?",
        "A red square.",
    ]


def test_a_conversation_is_found_in_json() -> None:
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]
    for content in (
        turns,
        {"conversations": turns},
        {"conversation": turns},
        talk("Which?", "Red."),
    ):
        found = record({"a/b.x.PNG": b"", "a/b.json": json.dumps(content).encode()})
        assert found["images"] == ["a/b.x.PNG"]
        assert [turn["content"] for turn in found["messages"]] == ["<image>\nWhich?", "Red."]


def test_the_rule_names_member_and_field() -> None:
    files = {"0.mp4": b"", "0.txt": b"no", "0.meta.json": b'{"alt": "A film."}'}
    found = record(files, text="meta.json", caption="alt")
    assert (found["videos"], found["messages"][1]["content"]) == (["0.mp4"], "A film.")
    assert found["messages"][0]["content"] == "<video>\nDescribe it."


def test_text_without_media_is_raw_text() -> None:
    assert record({"0.txt": "\ufeffA book.".encode()}) == {"text": "A book."}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"0.jpg": b""}, r"no text among \['jpg'\]"),
        ({"0.jpg": b"", "0.txt": b"\xff"}, r"0\.txt: not UTF-8: byte 0xff at 0"),
        ({"0.jpg": b"", "0.txt": b" \n"}, "the caption is ' .n': text is needed"),
        ({"0.jpg": b"", "0.json": b"{"}, r"0\.json: not JSON"),
        ({"0.jpg": b"", "0.json": b'{"caption": 3}'}, "the caption is 3"),
        ({"0.jpg": b"", "0.json": b"[3]"}, "turn 0 is 3"),
        ({"0.jpg": b"", "0.json": b'[{"say": 3}]'}, "turn 0 has .'say'."),
    ],
)
def test_members_that_are_no_sample_are_named(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        record(files)


JPG, AVIF, PNG = (picture((40, 40), "red", format=form) for form in ("JPEG", "AVIF", "PNG"))
TAGGED = json.dumps(talk("<image> or <image>?", "The first.")).encode()


@pytest.mark.parametrize(
    ("files", "rule", "images"),
    [
        ({"0.avif": AVIF, "0.txt": b"A cat."}, {}, ["0.avif"]),
        ({"0.JPG": JPG, "0.txt": b"A cat.", "0.prompts": b"BM texts"}, {}, ["0.JPG"]),
        ({"0..jpg": JPG, "0.txt": b"A cat.", "0.counts": b"3"}, {}, ["0..jpg"]),
        ({"0.seg.png": PNG, "0.txt": b"A cat."}, {}, ["0.seg.png"]),
        ({"0.jpg": JPG, "0.seg.png": PNG, "0.txt": b"A cat."}, {"ignore": ("seg.*",)}, ["0.jpg"]),
        ({"0.jpg": JPG, "0.seg.png": PNG, "0.txt": b"A cat."}, {"images": ("jpg",)}, ["0.jpg"]),
        ({"0.b.jpg": JPG, "0.a.png": PNG, "0.txt": b"x"}, {"images": ("a.png", "b.jpg")}, ["0.a.png", "0.b.jpg"]),
        ({"0.png": PNG, "0.txt": b"A cat."}, {"images": ("jpg;png",)}, ["0.png"]),
        ({"0.1.jpg": JPG, "0.2.jpg": JPG, "0.json": TAGGED}, {}, ["0.1.jpg", "0.2.jpg"]),
        ({"0.jpg": JPG, "0.wav": b"RIFF", "0.txt": b"A cat."}, {"ignore": ("wav",)}, ["0.jpg"]),
        ({"0.jpg": JPG, "0.x": JPG, "0.txt": b"A cat."}, {"ignore": ("x",)}, ["0.jpg"]),
        ({"0.jpg": JPG, "0.json": b'{"caption": "A cat.", "url": "http://x/y.jpg"}'}, {}, ["0.jpg"]),
        ({"0.jpg": JPG, "0.json": b'{"width": 40}', "0.txt": b"A cat."}, {}, ["0.jpg"]),
        ({"0.jpg": JPG, "0.json": b'{"image": "coco/7.jpg", "caption": "A"}'}, {}, ["0.jpg"]),
        (
            {"0.a.jpg": JPG, "0.b.jpg": JPG, "0.json": b'{"images": ["0.b.jpg", "0.a.jpg"], "caption": "A"}'},
            {},
            ["0.b.jpg", "0.a.jpg"],
        ),
    ],
)  # fmt: skip
def test_members_are_media_by_their_last_suffix_and_the_rule(
    files: dict[str, bytes], rule: dict[str, Any], images: list[str]
) -> None:
    found = record(files, **rule)
    assert found["images"] == images
    assert sum(turn["content"].count("<image>") for turn in found["messages"]) == len(images)


@pytest.mark.parametrize(
    ("files", "rule", "reason"),
    [
        ({"0.jpg": JPG, "0.seg.png": PNG}, {}, r"several media, \['0.jpg', '0.seg.png'\].*ignore"),
        ({"0.mp4": b"", "0.thumb.jpg": JPG}, {}, r"several media, \['0.thumb.jpg', '0.mp4'\]"),
        ({"0.jpg": JPG, "0.x": PNG}, {}, "0.x holds image data, by its first bytes"),
        ({"0.bin": AVIF}, {}, "0.bin holds image data, by its first bytes"),
        ({"0.jpg": JPG, "0.wav": b""}, {}, "0.wav holds sound"),
        ({"0.jpg": JPG, "0.JPG": JPG}, {}, "0.jpg and 0.JPG differ in the case of letters"),
        ({"0.jpg": JPG}, {"images": ("png",)}, "images of members.yaml names png"),
        ({"0.jpg": JPG, "0.json": b'{"images": ["a.jpg", "b.jpg"]}'}, {}, "it names 2 images"),
        ({"0.jpg": JPG, "0.json": b'{"video": "a.mp4"}'}, {}, "it names 1 videos"),
        ({"0.json": b'{"image": "a.jpg"}'}, {}, "it names 1 images"),
        ({"0.jpg": JPG, "0.json": b'{"mask": "m.png"}'}, {}, "mask is 'm.png'"),
        ({"0.jpg": JPG, "0.json": b'{"caption": "Another."}'}, {}, "caption and txt .* differ"),
        ({"0.jpg": JPG, "0.json": b'{"a": 1, "a": 2}'}, {}, "the key a occurs twice"),
    ],
)
def test_media_of_which_nothing_says_what_they_are_for_are_named(
    files: dict[str, bytes], rule: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        record(files | {"0.txt": b"A cat."}, **rule)


def test_a_record_of_ours_names_all_media_that_come_with_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "0.jpg": JPG,
            "0.json": json.dumps(talk("a", "b") | {"images": [], "videos": []}).encode(),
            "1.jpg": JPG,
            "1.json": json.dumps(talk("a", "b") | {"images": None, "videos": None}).encode(),
        },
    )
    index, quarantine = build_sound_index(shard, ChatFormat(tokenizer))
    assert index.keys() == ["1"]
    assert len(index.row(0).image_sizes) == 1
    assert "does not name 0.jpg" in quarantine.entries[0].reason


def test_turns_of_many_makers() -> None:
    pairs = read_chat([{"user": "a", "assistant": "b", "source": "x"}]).messages
    assert pairs == talk("a", "b")["messages"]
    assert read_chat([{"role": "model", "content": "c"}]).messages == [
        {"role": "assistant", "content": "c"}
    ]


def test_tags_are_placed_only_where_there_are_none() -> None:
    messages = talk("A <video> here.", "b")["messages"]
    placed = place_media(messages, {"images": ["x"], "videos": ["y"]})
    assert placed[0]["content"] == "<image>\nA <video> here."
    parts = [{"role": "user", "content": [{"type": "image"}]}]
    assert place_media(parts, {"images": ["x"]}) == parts


def test_a_rule_file_with_unknown_fields_is_refused(tmp_path: Path) -> None:
    assert read_rule(tmp_path) == MemberRule()
    (tmp_path / "members.yaml").write_text("prompt: Say.\n")
    assert read_rule(tmp_path) == MemberRule(prompt="Say.")
    (tmp_path / "members.yaml").write_text("images: jpg;png\nignore: [seg.png, '*.wav']\n")
    assert read_rule(tmp_path) == MemberRule(images=("jpg;png",), ignore=("seg.png", "*.wav"))
    for text in (
        "promt: Say.\n", "- x\n", "prompt: 3\n", "{", "images: 3\n", "ignore: [3]\n", "text: [a]\n"
    ):  # fmt: skip
        (tmp_path / "members.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"members\.yaml"):
            read_rule(tmp_path)


def test_a_run_reads_shards_of_others(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    recipe = toy_recipe(tmp_path)
    shard = write_tar(tmp_path / "shapes-0.tar", CAPTIONED | {"1.txt": b"Just words, many words."})
    other = write_shard(tmp_path / "more-0.tar", range(2))
    for path in (shard, other):
        index_shard(path, tokenizer)
    write_plan(make_plan(recipe, "train", tokenizer=tokenizer)[0], plan_path(recipe, "train"))
    stream = open_split(recipe, split="train", tokenizer=tokenizer, tile_share=(0, 1))
    texts = {}
    for pack in range(len(stream)):
        batch = stream[pack]
        for key, start, stop in zip(
            batch.sample_keys, batch.document_starts, batch.document_starts[1:], strict=False
        ):
            texts[key] = tokenizer.decode(batch.input_ids[start:stop].tolist())
    assert "A red square." in texts["0"]
    assert "Just words, many words." in texts["1"]
    assert read_index(index_of(shard)).row(0).record
    assert not read_index(index_of(other)).row(0).record


def test_the_members_of_others_shards_are_told_by_what_they_became(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "members.yaml").write_text("images: jpg\nignore: [cls]\n")
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": picture((9, 9), "red"), "0.txt": b"Red."})
    write_tar(shard, {"1.jpg": picture((9, 9), "blue"), "1.seg.png": picture((9, 9), "red")})
    write_tar(shard, {"1.txt": b"Blue.", "1.cls": b"3"})
    text = text_stamp(ChatFormat(tokenizer))
    index_shard(shard, tokenizer)
    (line,) = describe_members([shard], text)
    assert line == (
        f"{shard}: images: jpg (2); text: txt (2); ignored: seg.png (1), cls (1); "
        f"{tmp_path}/members.yaml may say otherwise"
    )
    own = write_shard(tmp_path / "own" / "b.tar", range(2))
    index_shard(own, tokenizer)
    assert not list(describe_members([own], text))


FAULTS = {
    "link": (
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "k.jpg",
        "is a link, a device or sparse",
    ),
    "hard link": (
        {"type": tarfile.LNKTYPE, "linkname": "0.jpg"},
        "k.jpg",
        "is a link, a device or sparse",
    ),
    "parent": ({}, "../k.jpg", "leads out of the folder"),
    "absolute": ({}, "/etc/k.jpg", "leads out of the folder"),
    "not UTF-8": ({}, "\udcff.jpg", "its key is not UTF-8"),
    "earlier key": ({}, "0.png", "an earlier sample of the shard has the same key"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_members_that_must_not_be_used_are_listed_and_the_others_are_indexed(
    tmp_path: Path, tokenizer: Tokenizer, fault: str
) -> None:
    fields, name, reason = FAULTS[fault]
    shard = write_tar(tmp_path / "a.tar", CAPTIONED)
    write_tar(shard, {"5.txt": b"Between."})
    write_tar(shard, {name: b"" if fields else b"x"}, **fields)
    write_tar(shard, {name.rpartition(".")[0] + ".txt": b"A caption."})
    write_tar(shard, {"9.txt": b"The last."})
    index, quarantine = build_sound_index(shard, ChatFormat(tokenizer))
    assert index.keys() == ["0", "5", "9"]
    (entry,) = quarantine.entries
    assert reason in entry.reason
    with pytest.raises(DataError, match=reason):
        build_index(shard, ChatFormat(tokenizer))


def test_a_member_that_comes_twice_spoils_its_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = write_tar(
        write_tar(tmp_path / "a.tar", CAPTIONED), {"0.txt": b"Again.", "1.txt": b"Next."}
    )
    index, quarantine = build_sound_index(shard, ChatFormat(tokenizer))
    assert index.keys() == ["1"]
    assert "two members are called '0.txt'" in quarantine.entries[0].reason


def test_of_a_damaged_tar_the_whole_samples_before_are_used(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    whole = write_shard(tmp_path / "a.tar", range(8)).read_bytes()
    headers = [
        min(m.offset for m in sample.members.values()) - 512
        for sample in scan_shard(tmp_path / "a.tar")
    ]
    for name, data in {
        "cut in a member": whole[: headers[5] + 700],
        "cut in a header": whole[: headers[5] + 100],
        "cut between": whole[: headers[5]],
        "damaged header": whole[: headers[5]] + b"\xff" * 512 + whole[headers[5] + 512 :],
    }.items():
        (tmp_path / "b.tar").write_bytes(data)
        index, quarantine = build_sound_index(tmp_path / "b.tar", ChatFormat(tokenizer))
        assert index.keys() == [f"s{i:04d}" for i in range(4)], name
        (entry,) = quarantine.entries
        assert entry.key == ""
        assert "not a readable .tar shard" in entry.reason


def test_a_header_with_a_negative_size_ends_the_scan(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", CAPTIONED)
    data = bytearray(shard.read_bytes())
    data[124:136] = (-512).to_bytes(12, "big", signed=True)
    data[148:156] = b"        "
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    shard.write_bytes(data)
    with pytest.raises(DataError, match="says that the member has -512 bytes"):
        list(scan_shard(shard))


def test_what_validate_listed_is_left_out_and_other_shards_lists_are_not_obeyed(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shard = write_shard(tmp_path / "a.tar", range(4))
    listed = Quarantine(shard_size=shard.stat().st_size).replaced(
        "validate", [Entry("validate", "s0001", "why")]
    )
    write_quarantine(listed, shard)
    assert build_index(shard, ChatFormat(tokenizer)).keys() == ["s0000", "s0002", "s0003"]
    write_shard(shard, range(5))
    assert len(build_index(shard, ChatFormat(tokenizer))) == 5
    assert read_quarantine(shard).entries == []


def test_a_list_is_written_only_where_it_changes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(2))
    found = Quarantine(shard_size=shard.stat().st_size, entries=[Entry("index", "k", "why")])
    write_quarantine(found, shard)
    later = shard.stat().st_mtime_ns + 10**12
    os.utime(quarantine_path(shard), ns=(later, later))
    write_quarantine(read_quarantine(shard), shard)
    assert quarantine_path(shard).stat().st_mtime_ns == later
    assert read_quarantine(shard) == found
    quarantine_path(shard).write_text("[]")
    with pytest.raises(DataError, match=r"quarantine\.json: not a list"):
        read_quarantine(shard)


def test_own_samples_that_name_what_is_not_theirs_are_bad(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with SampleWriter(tmp_path / "a.tar") as writer:
        writer.write(
            "k",
            record=talk("<image>", "b"),
            media={"image": [ShardMedia(".png", picture((9, 9), "red"))]},
        )
    data = (tmp_path / "a.tar").read_bytes().replace(b'["k.image0.png"]', b'[{"k.imag": 0 }]')
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(
        DataError, match=r"images names \{'k.imag': 0\}, which the shard does not hold"
    ):
        build_index(tmp_path / "a.tar", ChatFormat(tokenizer))
