"""A small JSONL file with pictures beside it, a recipe, and the shards made of it."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.cli import main


def sample(number: int) -> dict[str, Any]:
    """One picture and a question about it."""
    turns = ("<image>\nWhich number is it?", f"It is number {number}, no doubt about it.")
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), turns, strict=True)
    ]
    return {"id": number, "messages": messages, "images": [f"{number}.png"]}


def write_world(root: Path, count: int = 12) -> Path:
    """Writes `count` samples to toy.jsonl, pictures to media/ and recipe.yaml; gives the path of
    the JSONL file."""
    (root / "media").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (56 + 56 * (number % 2), 56), (20 * number % 256, 90, 160)).save(
            root / f"media/{number}.png"
        )
    path = root / "toy.jsonl"
    path.write_text("".join(json.dumps(sample(number)) + "\n" for number in range(count)))
    (root / "recipe.yaml").write_text(
        "model: {vision: {image_size: 28, patch_size: 7, hidden_size: 32, num_attention_heads: 2}}\n"
        f"text: {{tokenizer: {root}/toy.model}}\n"
        "media: {max_tiles: 4}\n"
        f"data: {{train: [{{name: toy, shards: '{root}/toy/*.tar'}}], plan: {root}/plan, seq_length: 256}}\n"
    )
    return path


def train_tokenizer(root: Path, *, vocab_size: int = 320) -> None:
    """Train the tokenizer that the recipe of a world names."""
    out = str(root / "toy.model")
    command = ["tokenizer", str(root / "toy.jsonl"), "--out", out, "--vocab-size", str(vocab_size)]
    assert main(command) == 0


def write_shards(root: Path, *options: str) -> None:
    """Write the shards that the recipe of a world names."""
    folders = ["--media", str(root / "media"), "--out", str(root / "toy")]
    assert main(["shard", str(root / "toy.jsonl"), *folders, *options]) == 0
