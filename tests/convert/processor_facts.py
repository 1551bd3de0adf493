"""Token ids and pixels that transformers' AutoProcessor gives for questions to InternVL, recorded
in `processor_facts.json`, since it needs torchvision.

`python -m tests.convert.processor_facts` records them anew where torchvision is installed.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.media.frame_archive import pack_frames
from tests.convert.asked_of_both import pixels_of
from tests.convert.asked_of_transformers import WITH_MEDIA, Question
from tests.convert.published import PREPROCESSORS
from tests.convert.published_models import internvl_hf
from tests.media.picture_files import file_of, photograph

FACTS = Path(__file__).with_suffix(".json")
EVERY = slice(3, None, 7)  # rows and columns of a tile whose pixels are kept
_CONTEXTS = re.compile("(?:<IMG_CONTEXT>)+")
_SHORT = re.compile(r"<IMG_CONTEXT x (\d+)>")


class Seen(NamedTuple):
    """Inputs of a model: the prompt's text with its special tokens, and pixels uint8 [N, n]."""

    text: str
    pixels: np.ndarray


def frames_of(question: Question) -> list[list[Image.Image]]:
    """A frame a second of each video; no codec is between them and the pixels."""
    return [
        [photograph((90, 62), seed=50 + second) for second in range(seconds)]
        for seconds in question.seconds
    ]


def by_processor(processor: Any, question: Question) -> Seen:
    """Prompt and pixels of a question by AutoProcessor's class."""
    text = processor.apply_chat_template(
        question.messages, tokenize=False, add_generation_prompt=True
    )
    videos = [
        torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
        for frames in frames_of(question)
    ]
    found = processor(
        images=question.images or None, text=[text], videos=videos or None, return_tensors="pt"
    )
    decoded = processor.tokenizer.decode(found["input_ids"][0], skip_special_tokens=False)
    return Seen(decoded, sampled(found.get("pixel_values")))


def by_engine(engine: Engine, question: Question) -> tuple[list[int], np.ndarray]:
    """Token ids and pixels that our engine gives its model."""
    images = [MediaFile(name="image", data=file_of(image, "PNG")) for image in question.images]
    videos = []
    for frames in frames_of(question):
        files = [(f"{i}.png", file_of(frame, "PNG")) for i, frame in enumerate(frames)]
        videos.append(MediaFile(name="video", data=pack_frames(files, fps=1.0)))
    prompt = Prompt(messages=question.messages, images=images, videos=videos)
    prepared = engine.prepare(prompt)
    pixels = pixels_of(engine, prepared) if prepared.files else None
    return prepared.document.input_ids.tolist(), sampled(pixels)


def sampled(normalized: Tensor | None) -> np.ndarray:
    """Some pixels of normalized tiles [N, 3, S, S], as values from 0 to 255."""
    if normalized is None:
        return np.zeros((0, 0), dtype=np.uint8)
    said = PREPROCESSORS["internvl3-1b-hf"]
    mean, deviation = (
        torch.tensor(said[name])[:, None, None] for name in ("image_mean", "image_std")
    )
    values = (normalized * deviation + mean) * 255
    kept = values[:, :, EVERY, EVERY].round().clamp(0, 255).to(torch.uint8)
    return kept.flatten(1).numpy()


def recorded() -> dict[str, Seen]:
    """The facts by the names of the questions."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    return {name: _long(fact["text"], fact["pixels"]) for name, fact in facts.items()}


def record(folder: Path) -> None:
    """Write the facts of a published folder's processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(internvl_hf(folder).folder)
    facts = {}
    for name, question in WITH_MEDIA.items():
        seen = by_processor(processor, question)
        text = _CONTEXTS.sub(lambda run: f"<IMG_CONTEXT x {len(run[0]) // 13}>", seen.text)
        facts[name] = {"text": text, "pixels": [row.tobytes().hex() for row in seen.pixels]}
    FACTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _long(text: str, pixels: list[str]) -> Seen:
    whole = _SHORT.sub(lambda run: "<IMG_CONTEXT>" * int(run[1]), text)
    rows = [np.frombuffer(bytes.fromhex(row), dtype=np.uint8) for row in pixels]
    return Seen(whole, np.stack(rows) if rows else np.zeros((0, 0), dtype=np.uint8))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        record(Path(temporary))
