"""Synthetic data for the miniature of a recipe: samples, tokenizer, indexes, plans."""

import io
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch.distributed as dist
from PIL import Image

from data_tools.planning import index_shards, write_plans
from data_tools.sharding import ShardJob, make_shards
from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.config.miniature import shrink
from megatron_vita.text.train import train_sentencepiece

logger = logging.getLogger(__name__)
FOLDER = Path("runs/miniature")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 200, 70),
    "blue": (50, 70, 220),
    "white": (240, 240, 240),
}
SIZES = ((64, 64), (160, 90), (90, 160), (120, 120))
SAMPLES = 24
SECONDS = 20


def open_miniature(recipe: Recipe, *, world_size: int, alone: bool) -> Recipe:
    """Build the miniature of a recipe for `world_size` ranks, with its data.

    The data is made by rank 0, or by this process if `alone`.
    """
    tiny = shrink(recipe, world_size=world_size, bf16=platform.on_cuda(), data=FOLDER)
    if not alone:
        platform.initialize_process()
    if alone or dist.get_rank() == 0:
        make_miniature_data(tiny)
    # The other ranks must not look for the data before it is complete.
    if not alone:
        dist.barrier()
    if tiny.checkpoint.load and not Path(tiny.checkpoint.load).exists():
        if alone or dist.get_rank() == 0:
            logger.warning(
                "%s does not exist: the miniature starts from initial weights", tiny.checkpoint.load
            )
        return tiny.replaced({"checkpoint.load": ""})
    return tiny


def make_miniature_data(recipe: Recipe) -> None:
    """Make the files that the miniature `recipe` names and that do not exist."""
    tokenizer = Path(recipe.text.tokenizer)
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    if not tokenizer.exists():
        texts = [
            part
            for i in range(200)
            for turn in _conversation(i)["messages"]
            for part in [turn["content"]]
        ]
        train_sentencepiece(texts, tokenizer, vocab_size=400)
    for dataset in (*recipe.data.train, *recipe.data.validation):
        _make_dataset(Path(dataset.shards).parent)
    index_shards(recipe)
    for _ in write_plans(recipe, strict=False):
        pass


def _make_dataset(folder: Path) -> None:
    """Write the shards of a dataset, with samples that depend on the folder's name."""
    if any(folder.glob("*.tar")):
        return
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    # A stable hash, since Python's own differs between processes.
    first = zlib.crc32(folder.name.encode()) % 1000
    samples = [_conversation(first + i) for i in range(SAMPLES)]
    for i, sample in enumerate(samples):
        for path, content in _media(sample, first + i):
            (raw / path).write_bytes(content)
    lines = raw / "samples.jsonl"
    lines.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    make_shards(
        ShardJob(files=[lines], media_root=raw, out=folder, samples_per_shard=SAMPLES, strict=True)
    )


def _conversation(number: int) -> dict[str, Any]:
    """Build a conversation about an image, two images, a video, or text alone."""
    kind = ("image", "text", "two images", "image", "video", "text")[number % 6]
    color = list(COLORS)[number % len(COLORS)]
    question, answer = {
        "image": ("<image>\nWhich color does the picture show?", color),
        "two images": ("<image>\n<image>\nWhich color do the pictures show?", color),
        "video": (
            f"<video>\nWhat happens in film number {number}?",
            f"It stays {color} for {SECONDS} seconds.",
        ),
        "text": (f"Say {color} {number % 9 + 1} times.", " ".join([color] * (number % 9 + 1))),
    }[kind]
    sample: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    if "image" in kind:
        count = question.count("<image>")
        sample["images"] = [f"{number}-{i}.png" for i in range(count)]
    if kind == "video":
        sample["videos"] = [f"{number}.mp4"]
    return sample


def _media(sample: dict[str, Any], number: int) -> Iterator[tuple[str, bytes]]:
    """Yield the media files that a sample names: (name, content)."""
    color = np.array(list(COLORS.values())[number % len(COLORS)])
    noise = np.random.default_rng(number)
    for i, name in enumerate(sample.get("images", [])):
        width, height = SIZES[(number + i) % len(SIZES)]
        buffer = io.BytesIO()
        Image.fromarray(_shade(color, noise, (height, width, 3))).save(buffer, "PNG")
        yield name, buffer.getvalue()
    for name in sample.get("videos", []):
        yield name, _film(color, noise)


def _shade(
    color: np.ndarray, noise: np.random.Generator, shape: tuple[int, int, int]
) -> np.ndarray:
    return np.clip(color + noise.integers(-15, 16, shape), 0, 255).astype(np.uint8)


def _film(color: np.ndarray, noise: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for _ in range(2 * SECONDS):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(_shade(color, noise, (48, 64, 3))))
            )
        container.mux(stream.encode())
    return buffer.getvalue()
