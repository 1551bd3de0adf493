"""A toy world: two datasets of pictures, clips and plain talk, in shards with indexes, and a recipe
of them."""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.data.batch import Batch
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.shards.index import read_index
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.text.tokenizer_base import Tokenizer
from tests.indexes import index_of, index_shard

COLORS = ("red", "green", "blue", "orange", "purple")
SIZES = ((40, 40), (200, 100), (90, 180), (300, 200))


@dataclass
class World:
    """Shards, indexes and plans in a folder, with their recipe and tokenizer."""

    root: Path
    recipe: Recipe
    tokenizer: Tokenizer


def picture(size: tuple[int, int], color: str, *, format: str = "PNG", **save: Any) -> bytes:
    """An image file with a white corner, so that turning it shows."""
    image = Image.new("RGB", size, color)
    image.paste("white", (0, 0, size[0] // 3, size[1] // 3))
    buffer = io.BytesIO()
    image.save(buffer, format, **save)
    return buffer.getvalue()


def clip(frames: int = 16) -> bytes:
    """A video at 8 frames per second that goes from black to red."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = 48
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 4
        for i in range(frames):
            pixels = np.zeros((32, 48, 3), dtype=np.uint8)
            pixels[..., 0] = 255 * i // frames
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def talk(*turns: str) -> dict[str, Any]:
    """A record whose turns are the user's and the assistant's by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def toy_sample(number: int) -> tuple[dict[str, Any], dict[str, list[ShardMedia]]]:
    """Sample `number`: one in four is text alone, one in five has a clip and two pictures, the
    others one picture."""
    color = COLORS[number % len(COLORS)]
    size = SIZES[number % 3 + (number % 7 == 0)]
    image = ShardMedia(".png", picture(size, color))
    if number % 4 == 3:
        return talk(
            f"How much is {number} + {number}?", f"It is {2 * number}. " * (1 + number % 5)
        ), {}
    if number % 5 == 1:
        record = talk(
            "<image>Here is a clip: <video>\nand this: <image>",
            "A clip.",
            "Sure?",
            "Yes, <image> is a tag.",
        )
        second = ShardMedia(".jpg", picture((90, 30), "gray", format="JPEG"))
        return record, {"image": [image, second], "video": [ShardMedia(".mp4", clip())]}
    return talk("<image>\nWhich colour?", f"It is {color}."), {"image": [image]}


def write_shard(path: Path, numbers: range) -> Path:
    """A shard of toy samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with SampleWriter(path) as writer:
        for number in numbers:
            record, media = toy_sample(number)
            writer.write(f"s{number:04d}", record=record, media=media)
    return path


def toy_recipe(root: Path, **data: Any) -> Recipe:
    """Trains on `shapes` (30 samples in 3 shards) and `more` (10 in one), validates on `more`."""
    shapes, more = ({"name": name, "shards": f"{root}/{name}-*.tar"} for name in ("shapes", "more"))
    fields = {
        "seq_length": 256,
        "document_alignment": 16,
        "shuffle_window": 16,
        "plan": f"{root}/plan",
    }
    vision = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_attention_heads": 2}
    return recipe_from_dict(
        {
            "model": {"vision": vision},
            "text": {"tokenizer": f"{root}/toy.model"},
            "media": {"max_tiles": 4, "max_fps": 4.0, "max_frames": 6},
            "data": {"train": [shapes, more], "validation": [more], **fields, **data},
        }
    )


def changed(recipe: Recipe, **groups: dict) -> Recipe:
    """The recipe with other fields in some groups."""
    tree = dataclasses.asdict(recipe)
    for group, fields in groups.items():
        tree[group] |= fields
    return recipe_from_dict(tree)


def make_world(root: Path, tokenizer: Tokenizer) -> Recipe:
    """Shards, indexes and plans under `root`."""
    shards = [
        write_shard(root / f"shapes-00000{i}.tar", range(10 * i, 10 * i + 10)) for i in range(3)
    ]
    shards.append(write_shard(root / "more-000000.tar", range(30, 40)))
    for shard in shards:
        index_shard(shard, tokenizer)
    recipe = toy_recipe(root)
    for split in ("train", "validation"):
        write_plan(make_plan(recipe, split, tokenizer=tokenizer)[0], plan_path(recipe, split))
    return recipe


def train_stream(world: World, tile_share: tuple[int, int] | None = (0, 1)) -> PackStream:
    """The training packs of a world."""
    return open_split(world.recipe, split="train", tokenizer=world.tokenizer, tile_share=tile_share)


def assert_same(first: Batch, second: Batch) -> None:
    """Two batches have the same values."""
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (
            name
        )


def damage(world: World, suffix: str = ".png") -> str:
    """Overwrites a member of `more` inside its shard; gives the member's name."""
    shard = world.root / "more-000000.tar"
    index = read_index(index_of(shard))
    members = [member for i in range(len(index)) for member in index.row(i).members.values()]
    member = next(member for member in members if member.name.endswith(suffix))
    with open(shard, "r+b") as file:
        file.seek(member.offset + member.size // 3)
        file.write(b"\0" * (member.size - member.size // 3))
    return member.name
