"""Prompt ids and pixels that transformers gives for questions about texts, images and videos."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from tests.convert.published import TILE
from tests.convert.published_models import ROWS
from tests.media.picture_files import file_of, photograph
from tests.media.video_files import clip
from tests.text.internvl_processor import WithoutTorchvision
from tests.text.published import INTERNVL_SYSTEM

RATE = 25  # frames a second of the clips


@dataclass(frozen=True)
class Question:
    """Turns, by turns the user's and the assistant's, with images by their sizes and videos by
    their seconds."""

    contents: Sequence[Any]
    sizes: Sequence[tuple[int, int]] = ()
    seconds: Sequence[int] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [
            {"role": ("user", "assistant")[place % 2], "content": content}
            for place, content in enumerate(self.contents)
        ]

    @property
    def images(self) -> list[Image.Image]:
        return [photograph(size, seed) for seed, size in enumerate(self.sizes)]

    @property
    def videos(self) -> list[bytes]:
        return [clip(frames=RATE * seconds) for seconds in self.seconds]

    def prompt(self) -> Prompt:
        """The question as our engine is asked it."""
        images = [MediaFile(name="image", data=file_of(image, "PNG")) for image in self.images]
        videos = [MediaFile(name="video", data=data) for data in self.videos]
        return Prompt(messages=self.messages, images=images, videos=videos)

    def frames(self) -> list[np.ndarray]:
        """One frame a second of each video, those that InternVL's video processor takes."""
        taken = []
        for data, seconds in zip(self.videos, self.seconds, strict=True):
            with av.open(io.BytesIO(data)) as container:
                everything = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
            places = np.arange(RATE / 2, len(everything), len(everything) / seconds).astype(int)
            taken.append(np.stack([everything[place] for place in places]))
        return taken


def part(kind: str, text: str = "") -> dict[str, str]:
    return {"type": kind, "text": text} if text else {"type": kind}


TEXTS = {
    "text": Question(["What is this?"]),
    "several turns": Question(["hello", "A cat.", " sure?", "Yes", "what is on the mat"]),
}
SQUARE = (TILE, TILE)
WIDE = (3 * TILE + 20, TILE)
TALL = (100, 260)
COLUMNS = {3: 3, 10: 2}
"""Columns of the grids of these two, by their cells."""
WITH_MEDIA = TEXTS | {
    "one tile": Question([[part("image"), part("text", "What is this?")]], [SQUARE]),
    "several tiles": Question([[part("image"), part("text", "What is this?")]], [WIDE]),
    "two images": Question(
        [[part("image"), part("image"), part("text", "and this?")]], [TALL, SQUARE]
    ),
    "a video": Question([[part("video"), part("text", "What is this?")]], seconds=[3]),
    "media over turns": Question(
        [
            [part("image"), part("text", "What?")],
            "A cat.",
            [part("video"), part("image"), part("text", "And?")],
        ],
        [WIDE, SQUARE],
        [2],
    ),
}


@dataclass(frozen=True)
class Inputs:
    """Input of a model of transformers."""

    ids: list[int]
    pixels: Tensor | None = None

    @property
    def media(self) -> dict[str, Tensor]:
        return {} if self.pixels is None else {"pixel_values": self.pixels}


def of_text(tokenizer: PreTrainedTokenizerFast, question: Question) -> Inputs:
    """By the chat template."""
    found = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True)
    return Inputs(found["input_ids"])


def of_processor(processor: WithoutTorchvision, question: Question) -> Inputs:
    """By transformers' processor for InternVL."""
    text = processor.apply_chat_template(
        question.messages, tokenize=False, add_generation_prompt=True
    )
    found = processor(images=question.images or None, text=[text], videos=question.frames() or None)
    pixels = found.get("pixel_values")
    return Inputs(
        list(found["input_ids"][0]), None if pixels is None else torch.tensor(np.stack(pixels))
    )


def of_chat_format(
    tokenizer: PreTrainedTokenizerFast, processor: WithoutTorchvision, question: Question
) -> Inputs:
    """As the code of OpenGVLab's own format writes prompts: one tag around all tiles of an image,
    and `Frame1: ` before a frame."""

    def image(pixels: list[np.ndarray]) -> str:
        return f"<img>{'<IMG_CONTEXT>' * ROWS * len(pixels)}</img>\n"

    def video(frames: list[np.ndarray]) -> str:
        return "".join(f"Frame{i + 1}: {image([frame])}" for i, frame in enumerate(frames))

    messages, pixels = _written(question, processor, image=image, video=video)
    system = {"role": "system", "content": INTERNVL_SYSTEM}
    return _tokenized(tokenizer, [system, *messages], pixels)


def of_long_vita(
    tokenizer: PreTrainedTokenizerFast, processor: WithoutTorchvision, question: Question
) -> Inputs:
    """As Long-VITA's code writes prompts: the thumbnail first and a tag around each tile, ChatML
    without a system turn."""

    def image(pixels: list[np.ndarray]) -> str:
        thumbnail = f"<img>{'<IMG_CONTEXT>' * ROWS}</img>"
        if len(pixels) == 1:
            return thumbnail
        pixels.insert(0, pixels.pop())
        cols = COLUMNS[len(pixels) - 1]
        row = "\n" + f"<patch>{'<PATCH_CONTEXT>' * ROWS}</patch>" * cols
        return thumbnail + row * ((len(pixels) - 1) // cols)

    def video(frames: list[np.ndarray]) -> str:
        return f"<vid>{'<VID_CONTEXT>' * ROWS}</vid>" * len(frames)

    messages, pixels = _written(question, processor, image=image, video=video, before_text="\n")
    return _tokenized(tokenizer, messages, pixels)


def _written(
    question: Question,
    processor: WithoutTorchvision,
    *,
    image: Any,
    video: Any,
    before_text: str = "",
) -> tuple[list[dict[str, str]], list[np.ndarray]]:
    """Messages with texts for media, and all tiles; `before_text` parts a text from a medium."""
    images = iter(question.images)
    videos = iter(question.frames())
    tiles: list[np.ndarray] = []
    messages = []
    for message in question.messages:
        said = ""
        content = message["content"]
        for piece in [part("text", content)] if isinstance(content, str) else content:
            if piece["type"] == "text":
                said += (before_text if said else "") + piece["text"]
                continue
            if piece["type"] == "image":
                found = processor.image_processor(next(images), return_tensors="np")
                pixels = list(found["pixel_values"])
                said += image(pixels)
            else:
                pixels = list(
                    processor._process_videos([next(videos)])[0]["pixel_values_videos"][0]
                )
                said += video(pixels)
            tiles += pixels
        messages.append({"role": message["role"], "content": said})
    return messages, tiles


def _tokenized(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], pixels: list[np.ndarray]
) -> Inputs:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Inputs(ids, torch.tensor(np.stack(pixels)) if pixels else None)
