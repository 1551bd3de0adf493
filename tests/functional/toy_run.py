"""A toy dataset, tokenizer, plan and recipe in a folder, made with `data_tools` as a user would."""

import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from typer.testing import CliRunner

from data_tools.cli import app
from tests.once import made_once

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
QUICK = ["data.num_workers=0", "training.eval_interval=0", "checkpoint.save=''"]
"""Overrides for a run without loader processes, validation and checkpoints."""


def write_samples(folder: Path, count: int) -> Path:
    """Images of one colour, of one or several tiles, every third sample text only."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    rows = []
    for i in range(count):
        name, color = list(COLORS.items())[i % 3]
        question = {"role": "user", "content": f"<image>\nwhat color is it? number {i}"}
        sample: dict[str, list] = {
            "messages": [question, {"role": "assistant", "content": name}],
            "images": [f"images/{i}.png"],
        }
        size = ((16, 16), (40, 16), (33, 35))[i % 3 if i % 2 else 0]
        pixels = np.clip(np.array(color) + noise.integers(-30, 30, (size[1], size[0], 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / sample["images"][0])
        if i % 3 == 2:
            sample = {
                "messages": [{"role": "user", "content": f"say {name}"}, sample["messages"][1]]
            }
        rows.append(sample)
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_tools(*arguments: str | Path) -> None:
    """Runs a command of `data_tools` in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def toy_recipe(folder: Path) -> dict:
    """A recipe of the toy data as plain values."""
    shards = str(folder / "shards" / "*.tar")
    return {
        "model": {
            "vision": {"image_size": 16, "patch_size": 4, "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32,
                       "num_attention_heads": 2},
            "language": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
                         "num_query_groups": 2, "kv_channels": 8, "vocab_size": 320},
        },
        "text": {"tokenizer": str(folder / "toy.model")},
        "media": {"max_tiles": 4},
        "data": {"train": [{"name": "colors", "shards": shards}], "validation": [{"name": "held", "shards": shards}],
                 "plan": str(folder / "plan"), "seq_length": 256, "epochs": 4},
        "optimizer": {"lr": 3e-3},
        "training": {"train_iters": 12, "global_batch_size": 4, "eval_interval": 6, "eval_iters": 1,
                     "hang_seconds": 0},
        "checkpoint": {"save": str(folder / "checkpoints"), "save_interval": 4},
    }  # fmt: skip


def make_toy_run(folder: Path, *, samples: int = 90) -> Path:
    """Put everything that a run needs into a folder; returns the recipe's path."""
    # A plan names shards by their contents, so that all of it may be copied.
    data = made_once(f"toy-run-{samples}", lambda place: _make_data(place, samples))
    shutil.copytree(data, folder, dirs_exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(toy_recipe(folder)))
    return recipe


def _make_data(folder: Path, samples: int) -> None:
    """Put tokenizer, shards, indexes and plans into a folder."""
    jsonl = write_samples(folder, samples)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(toy_recipe(folder)))
    data_tools("tokenizer", jsonl, "--out", folder / "toy.model", "--vocab-size", "310")
    data_tools(
        "shard", jsonl, "--out", folder / "shards", "--media", folder, "--samples-per-shard", "32"
    )
    data_tools("index", recipe)
    data_tools("plan", recipe)
