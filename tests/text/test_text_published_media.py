"""Images and videos in prompts of published families: ids are those of InternVL's processor."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import InternVLProcessor

from megatron_vita.config import MediaConfig, VisionConfig
from megatron_vita.data.samples.documents import Document, assemble_document
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.media.video import VideoInfo
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.pieces import MediaPiece
from tests.text.internvl_processor import internvl_processor
from tests.text.published import FAMILIES
from tests.text.published_chat import SYSTEM, Published

ROWS = 4
TILE = 56


@pytest.fixture(scope="module")
def processor(published: Callable[[str], Published]) -> InternVLProcessor:
    return internvl_processor(published("internvl-hf").theirs, tile=TILE, rows=ROWS)


def as_encoder(chat: ChatFormat) -> SampleEncoder:
    vision = VisionConfig(image_size=TILE, patch_size=14)
    media = MediaConfig(max_frames=100, max_fps=1.0)
    encoder = SampleEncoder(chat=chat, media=media, vision=vision)
    assert encoder.vision.image_token_length == ROWS
    return encoder


def document_of(
    chat: ChatFormat,
    messages: list[dict[str, Any]],
    *,
    sizes: list[tuple[int, int]] = [],  # noqa: B006
    frames: list[int] = [],  # noqa: B006
    prompt: bool = True,
) -> Document:
    """The document of a conversation with images of some sizes and videos of some frames."""
    encoder = as_encoder(chat)
    sample = {
        "messages": messages,
        "images": ["image"] * len(sizes),
        "videos": ["video"] * len(frames),
    }
    turns = check_messages(sample, needs_answer=not prompt)
    infos = [VideoInfo(duration=float(n), fps=1.0, frames=n) for n in frames]
    return assemble_document(
        chat.prompt(turns) if prompt else chat.encode(turns),
        key="",
        media={
            "image": [encoder.image("image", size) for size in sizes],
            "video": [encoder.video("video", info) for info in infos],
        },
        encoder=encoder,
    )


def part(kind: str) -> dict[str, str]:
    return {"type": kind}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


SQUARE = (TILE, TILE)
WIDE = (3 * TILE, TILE)
TALL = (100, 260)
ASKED: dict[str, tuple[list[Any], list[tuple[int, int]], list[int]]] = {
    "one tile": ([[part("image"), words("What is this?")]], [SQUARE], []),
    "several tiles": ([[part("image"), words("What is this?")]], [WIDE], []),
    "two images": ([[part("image"), part("image"), words(" and this?")]], [TALL, SQUARE], []),
    "between words": ([[words("hello "), part("image"), words("\nand "), part("image")]], [WIDE, TALL], []),
    "a video": ([[part("video"), words("What is this?")]], [], [11]),
    "a video after words": ([[words("the cat: "), part("video")]], [], [1]),
    "all, over turns": (
        [[part("image"), words("What?")], "A cat.", [part("video"), part("image"), words("And?")], "no", "why?"],
        [WIDE, SQUARE],
        [3],
    ),
}  # fmt: skip


def as_messages(contents: list[Any]) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[place % 2], "content": content}
        for place, content in enumerate(contents)
    ]


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("case", ASKED)
def test_media_have_the_ids_of_internvls_processor(
    published: Callable[[str], Published],
    processor: InternVLProcessor,
    case: str,
    system: list[dict[str, str]],
) -> None:
    contents, sizes, frames = ASKED[case]
    messages = [*system, *as_messages(contents)]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.new("RGB", size) for size in sizes]
    videos = [np.zeros((count, TILE, TILE, 3), dtype=np.uint8) for count in frames]
    theirs = processor(images=images or None, text=[text], videos=videos or None)
    document = document_of(published("internvl-hf").chat, messages, sizes=sizes, frames=frames)
    assert document.input_ids.tolist() == list(theirs["input_ids"][0])
    context = document.input_ids == processor.image_token_id
    assert context.sum() == len(document.placements) * ROWS
    assert all(context[place : place + ROWS].all() for place in document.placements)
    assert len(set(document.placements.tolist())) == len(document.placements)


@pytest.mark.parametrize("name", ["internvl-hf", "internvl-chat"])
def test_tags_in_a_text_stand_where_they_are_put(
    published: Callable[[str], Published], name: str
) -> None:
    chat = published(name).chat
    messages = [{"role": "user", "content": "<image>\nWhat, and <video>?"}]
    ids = document_of(chat, messages, sizes=[WIDE], frames=[2]).input_ids.tolist()
    tile = "<IMG_CONTEXT>" * ROWS
    image = f"<img>{tile * 4}</img>"
    video = f"Frame1: <img>{tile}</img>\nFrame2: <img>{tile}</img>"
    begins = FAMILIES[name].begins.removesuffix("<|im_start|>user\n")
    wanted = (
        f"{begins}<|im_start|>user\n{image}\nWhat, and {video}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.tokenizer.decode(ids, skip_special=False) == wanted
    assert ids == published(name).theirs(wanted, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["internvl-hf", "internvl-chat"])
def test_images_in_lists_are_each_followed_by_a_line_break_in_both_layouts(
    published: Callable[[str], Published], name: str
) -> None:
    chat = published(name).chat
    listed = [{"role": "user", "content": [part("image"), part("image"), words("What?")]}]
    tagged = [{"role": "user", "content": "<image>\n<image>\nWhat?"}]
    both = [document_of(chat, each, sizes=[WIDE, SQUARE]) for each in (listed, tagged)]
    assert both[0].input_ids.tolist() == both[1].input_ids.tolist()


def test_media_are_trained_around_and_counted_from_metadata(
    published: Callable[[str], Published],
) -> None:
    chat = published("internvl-hf").chat
    encoder = as_encoder(chat)
    contents, sizes, frames = ASKED["all, over turns"]
    messages = as_messages(contents[:4])
    document = document_of(chat, messages, sizes=sizes, frames=frames, prompt=False)
    scored = document.labels[document.labels != IGNORED_LABEL].tolist()
    wanted = [chat.tokenizer.encode(said) for said in ("A cat.", "no")]
    end = chat.tokenizer.special_id("<|im_end|>")
    assert scored == [*wanted[0], end, *wanted[1], end]
    for count in (1, 2, 9, 10, 11, 100):
        assert encoder.video_tokens(count) == len(encoder.placeholders.video(count).ids)
    for size in sizes:
        grid = encoder.image("", size).grid
        assert encoder.measure_image(size)[0] == len(encoder.placeholders.image(grid).ids)


def test_a_template_without_images_in_lists_takes_those_in_lists_as_tags(
    published: Callable[[str], Published],
) -> None:
    chat = published("qwen3").chat  # its template compares contents with words
    messages = [{"role": "user", "content": [part("image"), words("What?")]}]
    pieces = chat.prompt(
        check_messages({"messages": messages, "images": ["a"]}, needs_answer=False)
    )
    assert sum(isinstance(piece, MediaPiece) for turn in pieces for piece in turn) == 1
