"""A small JSONL file with pictures beside it, and a recipe for what becomes of it."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


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
