"""Records of all layouts, some with fields that change nothing, and some with what must be refused."""

import base64
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.data_tools.foreign_layouts import (
    LAYOUTS,
    PICTURES,
    Layout,
    Record,
    Truth,
    make_truth,
)
from tests.data_tools.imports import picture


@dataclass
class Case:
    """A record, what it says, and what of it must be refused by name."""

    layout: Layout
    truth: Truth
    record: Record
    refused: str = ""


def with_neutral(case: Case, rng: Random) -> None:
    """Fields that change nothing."""
    neutral: list[Record] = [
        {"source": "coco", "license": 4, "score": 0.5},
        {
            "audios": [],
            "tools": None,
            "rejected_response": None,
            "objects": {"bbox": [], "ref": []},
        },
        {"videos": None} if not case.truth.all_videos and "videos" not in case.record else {},
        {"metadata": {"split": "train", "tags": ["a", "b.c"], "size": [12, 8]}},
    ]
    if case.truth.all_images:
        neutral.append({"coco_url": "https://x.org/photo.jpg", "image_id": 7})
    for fields in rng.sample(neutral, 2):
        case.record |= {name: value for name, value in fields.items() if name not in case.record}


def with_refused(case: Case, rng: Random) -> None:
    """A field that is not understood, by which the record must be refused."""
    url = f"data:image/png;base64,{base64.b64encode(PICTURES['photos/red.png']).decode()}"
    fields: dict[str, Any] = {
        "thumb": "photos/thumb.png",
        "mask": ["masks/1.png", "masks/2.png"],
        "extra.depth": "deep/x.tiff",
        "preview": url,
        "control": {"path": "pose.webp", "bytes": None},
        "sound": "voice.wav",
        "audios": ["voice.wav"],
        "rejected_response": ["No."],
        "candidates": ["No.", "Yes."],
        "chosen": {"from": "gpt", "value": "Yes."},
        "kto_tag": True,
        "label": False,
        "loss_mask": [0, 1],
        "train_on_input": True,
        "tools": '[{"name": "search"}]',
        "dialogue_zh": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    if case.layout.form == "hf":
        fields |= {"seg.png": picture("white"), "pixels": picture("blue", "JPEG")}
    name = rng.choice(sorted(fields))
    if name == "label" and case.layout.name == "webdataset in Parquet":
        name = "thumb"
    case.refused = name
    outer, _, inner = name.partition(".")
    nested = inner and name != "seg.png"
    case.record |= {outer: {inner: fields[name]}} if nested else {name: fields[name]}


def with_refused_turn(case: Case, rng: Random) -> None:
    """A turn that says what cannot be learnt."""
    said = next(
        (case.record[name] for name in ("messages", "conversations") if name in case.record), None
    )
    if not isinstance(said, list):
        with_refused(case, rng)
        return
    fields = {
        "tool_calls": [{"function": {"name": "f"}}],
        "reasoning_content": "Let me think.",
        "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}],
        "weight": 0.25,
        "scan": "scans/0.jpg",
    }
    name = rng.choice(sorted(fields))
    said[-1][name] = fields[name]
    case.refused = name


def make_cases(count: int, seed: int) -> list[Case]:
    """So many records, dealt over the layouts: half as they are, half with more fields."""
    rng = Random(seed)
    cases = []
    for number in range(count):
        layout = LAYOUTS[number % len(LAYOUTS)]
        truth = make_truth(layout, rng)
        case = Case(layout, truth, layout.write(truth, rng))
        chance = rng.random()
        if chance < 0.25:
            with_refused(case, rng)
        elif chance < 0.4:
            with_refused_turn(case, rng)
        elif chance < 0.7:
            with_neutral(case, rng)
        cases.append(case)
    return cases
