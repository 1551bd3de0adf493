"""Fields of foreign records that ask for what is not done are refused by name, and those that mean a
system's turn are used."""

from typing import Any

import pytest

from megatron_vita.data.samples.foreign import SYSTEMS, Beside, sample_of
from megatron_vita.errors import DataError

TALK = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]


def film(**fields: Any) -> dict[str, Any]:
    return {"video": "a.mp4", "conversations": TALK} | fields


def part(**fields: Any) -> dict[str, Any]:
    video = {"type": "video", "video": "a.mp4"} | fields
    content = [video, {"type": "text", "text": "Who?"}]
    answer = {"role": "assistant", "content": "I."}
    return {"messages": [{"role": "user", "content": content}, answer]}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_prompt_is_used_whatever_its_makers_call_it(name: str) -> None:
    sample = sample_of({"conversations": TALK, name: "Be kind."})
    assert sample["messages"][0] == {"role": "system", "content": "Be kind."}
    captioned = sample_of({"image": "a.png", "caption": "A cat.", name: "Be kind."})
    assert captioned["messages"][0] == {"role": "system", "content": "Be kind."}


def test_two_system_prompts_must_agree() -> None:
    agreed = sample_of({"conversations": TALK, "system": "A.", "system_message": "A."})
    assert [turn["role"] for turn in agreed["messages"]] == ["system", "user", "assistant"]
    with pytest.raises(DataError, match="system and meta_instruction are both given, and differ"):
        sample_of({"conversations": TALK, "system": "A.", "meta_instruction": "B."})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_mask", [0, 1]),
        ("train_mask", "01"),
        ("loss_scale", [0.5, 1.0]),
        ("label_weights", [0.1]),
        ("assistant_masks", [1]),
        ("prompt_loss_mask", [1]),
        ("mask_history", True),
        ("train_on_input", True),
    ],
)
def test_masks_of_parts_of_a_record_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"^{name} is "):
        sample_of({"conversations": TALK, name: value})
    with pytest.raises(DataError, match=rf"^turn \d+\.?.*{name} is "):
        sample_of({"conversations": [TALK[0], TALK[1] | {name: value}]})
    harmless: tuple[Any, ...] = (None, False, [], "")
    for neutral in harmless:
        assert sample_of({"conversations": TALK, name: neutral}) == sample_of(
            {"conversations": TALK}
        )


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (film(end=5.0), "end"),
        (film(start=1.5), "start"),
        (film(start=0, end_time="00:00:05"), "end_time"),
        (film(clip_end=3), "clip_end"),
        (film(start_frame=8), "start_frame"),
        (part(video_start=1), r"turn 0\.content\[0\]\.video_start"),
        (part(video_start=0.0, video_end=2.5), r"turn 0\.content\[0\]\.video_end"),
    ],
)
def test_a_part_of_a_video_is_refused_by_name(record: dict[str, Any], name: str) -> None:
    with pytest.raises(DataError, match=f"^{name} is .*a video is used whole"):
        sample_of(record)


@pytest.mark.parametrize(
    "record",
    [
        film(start=0, duration=5.0, fps=2),
        film(end=None, starts=3),
        part(video_start=0, video_end=None),
        {"conversations": TALK, "start": 3, "end": 9},
    ],
)
def test_a_video_from_its_start_is_used_and_texts_may_have_ends(record: dict[str, Any]) -> None:
    roles = [turn["role"] for turn in sample_of(record)["messages"]]
    assert roles == ["user", "assistant"]


def test_a_part_of_a_video_of_a_turn_is_refused_by_name() -> None:
    asked = {"from": "human", "value": "What is it?", "video": "a.mp4", "start": 3, "end": 5}
    with pytest.raises(DataError, match=r"^turn 0\.start is 3: a video is used whole"):
        sample_of({"conversations": [asked, TALK[1]]})


def test_times_of_a_clip_whose_content_comes_along_tell_its_origin() -> None:
    record = {"caption": "A cat.", "start_time": 3.5, "end_time": 9.0}
    sample = sample_of(record, beside=Beside({"images": [], "videos": ["a.mp4"]}))
    assert sample["videos"] == ["a.mp4"]
    content = b"\0\0\0\x18ftypisom"
    assert sample_of(record | {"mp4": content})["videos"] == [content]


@pytest.mark.parametrize("name", ["image", "images", "video", "img_path", "image_1"])
@pytest.mark.parametrize("nothing", [None, [], ""])
def test_a_tag_beside_an_empty_field_for_media_is_no_literal_text(name: str, nothing: Any) -> None:
    asked = [{"from": "human", "value": "<image> Who?"}, TALK[1]]
    record = {"conversations": asked, name: nothing}
    found = sample_of(record, literal_tags=True)
    assert found["messages"][0]["content"] == "<image> Who?"
    passed_over = sample_of(record, literal_tags=True, ignore=[name])
    assert passed_over["messages"][0]["content"] == "\\<image> Who?"
