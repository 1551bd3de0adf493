"""Tars and folders as other makers lay them out: each sample is used whole, or refused by the name of
what is not understood."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from data_tools.formats.base import Setting
from data_tools.importing import ImportJob, import_samples
from data_tools.workers.pool import WorkerOptions
from tests.data_tools.foreign_layouts import COLORS, words
from tests.data_tools.imports import picture

CASES = 60  # of each kind
QUESTION = "What is to be seen?"
SOUND = b"RIFF\x24\0\0\0WAVEfmt " + bytes(24)
FORMS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "JPG": "JPEG", "tif": "TIFF"}
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(80)


@dataclass
class Case:
    """Files of a sample by their names, the question, the answer and the medium they mean, and the
    name by which it must be refused instead."""

    files: dict[str, bytes]
    question: str
    answer: str
    medium: str
    refused: str = ""


def text_member(rng: Random, answer: str) -> tuple[str, bytes, str]:
    """A text as webdatasets hold it: suffix, content, and the question it answers."""
    asked = words(rng) + "?"
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"conversations": turns, "id": rng.randint(0, 9)}
    caption = {"caption": answer, "width": 12, "url": "https://x.org/a.jpg", "key": "a"}
    return rng.choice(
        [
            ("txt", answer.encode(), QUESTION),
            ("txt", b"\xef\xbb\xbf" + answer.encode() + b"\r\n", QUESTION),
            ("json", json.dumps(caption).encode(), QUESTION),
            ("json", json.dumps(turns).encode(), asked),
            ("json", json.dumps(record).encode(), asked),
        ]
    )


def of_tar(key: str, rng: Random) -> Case:
    """Members of a plain webdataset."""
    answer = words(rng).capitalize() + "."
    suffix = rng.choice(sorted(FORMS))
    text, content, asked = text_member(rng, answer)
    image = picture(rng.choice(COLORS), FORMS[suffix])
    case = Case({f"{key}.{suffix}": image, f"{key}.{text}": content}, asked, answer, suffix.lower())
    chance = rng.random()
    if chance < 0.35:
        others = {"cls": b"3", "prompts": b"some prompts", "counts": b"1 2", "meta.yaml": b"a: 1"}
        name = rng.choice(sorted(others))
        case.files[f"{key}.{name}"] = others[name]
    elif chance < 0.7:
        wrong = {
            "wav": SOUND,
            "mask": picture("white"),
            "seg.png": picture("blue"),
            "depth.tiff": picture("red", "TIFF"),
            "thumbnail": picture("green", "JPEG"),
        }
        case.refused = rng.choice(sorted(wrong))
        # Tags in a conversation count the images: two images for one tag are named by their number.
        if asked != QUESTION and case.refused in ("seg.png", "depth.tiff"):
            case.refused = "wav"
        case.files[f"{key}.{case.refused}"] = wrong[case.refused]
    return case


def of_captions(key: str, rng: Random) -> Case:
    """An image or a film beside its caption, as folders of captions and of frames have them."""
    answer = words(rng).capitalize() + "."
    suffix = rng.choice(sorted(FORMS))
    name = f"{key}.{suffix}"
    caption = rng.choice([f"{key}.txt", f"{name}.txt"])
    image = picture(rng.choice(COLORS), FORMS[suffix])
    case = Case({name: image, caption: answer.encode()}, QUESTION, answer, name)
    chance = rng.random()
    if chance < 0.3:
        case.files |= {f"._{name}": APPLE, ".DS_Store": b"\0\0\0\1Bud1", "Thumbs.db": b"\xd0\xcf"}
    elif chance < 0.5:
        case.refused = f"{key}x.dat"
        case.files = {case.refused: picture("red"), f"{key}x.txt": b"A cat."}
    elif chance < 0.7:
        del case.files[caption]
        case.refused = f"{key}.txt"
    return case


def of_frames(key: str, rng: Random) -> Case:
    """A folder of frames beside its caption."""
    answer = words(rng).capitalize() + "."
    count = rng.randint(2, 5)
    frames = {f"{key}/{i:04d}.jpg": picture(COLORS[i % 4], "JPEG") for i in range(count)}
    case = Case(frames | {f"{key}.txt": answer.encode()}, QUESTION, answer, key)
    chance = rng.random()
    if chance < 0.3:
        case.files |= {f"{key}/._{i:04d}.jpg": APPLE for i in range(count)}
    elif chance < 0.5:
        case.files[f"{key}/fps.txt"] = b"2"
    elif chance < 0.7:
        del case.files[f"{key}.txt"]
        case.refused = f"{key}.txt"
    return case


MAKERS = {"webdataset": of_tar, "captions": of_captions, "frames": of_frames}


def write(cases: list[Case], root: Path, form: str) -> list[Path]:
    """Write the cases' files; gives the sources of an import."""
    if form == "webdataset":
        with tarfile.open(root / "set.tar", "w") as tar:
            for name, data in (item for case in cases for item in case.files.items()):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return [root / "set.tar"]
    for number, case in enumerate(cases):
        for name, data in case.files.items():
            path = root / "set" / f"{number:03d}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return [root / "set"]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", MAKERS)
def test_foreign_tars_and_folders_are_used_whole_or_refused_by_name(
    form: str, tmp_path: Path
) -> None:
    rng = Random(15)
    cases = [MAKERS[form](f"k{number:03d}", rng) for number in range(CASES)]
    setting = Setting(media=tmp_path, media_out=tmp_path / "found", prompt=QUESTION)
    out = tmp_path / "out.jsonl"
    job = ImportJob(format=form, paths=write(cases, tmp_path, form), out=out, setting=setting)
    import_samples(job, options=WorkerOptions(workers=0))
    samples = iter(lines(out))
    reasons = [
        f"{entry['place']} {entry['reason']}" for entry in lines(out.with_suffix(".rejected.jsonl"))
    ]
    for number, case in enumerate(cases):
        if case.refused:
            mine = [reason for reason in reasons if f"k{number:03d}" in reason]
            assert len(mine) == 1, (case, mine)
            assert case.refused in mine[0], (case, mine)
        else:
            check(next(samples), case, root=tmp_path)
    assert next(samples, None) is None
    assert len(reasons) == sum(bool(case.refused) for case in cases) > CASES / 6


def check(sample: dict[str, Any], case: Case, *, root: Path) -> None:
    """A sample has the question, the answer and the medium of a case."""
    asked, answered = (turn["content"] for turn in sample["messages"])
    assert asked.split("\n", 1)[1] == case.question, case
    assert answered == case.answer, case
    (medium,) = sample.get("images", []) + sample.get("videos", [])
    path = root / medium if (root / medium).exists() else root / "found" / medium
    if path.is_dir():
        assert path.name == case.medium, case
    else:
        assert path.read_bytes() in case.files.values(), case
