"""Time, memory, fill and balance of pack plans of a million samples.

    python benchmarks/plan.py [--samples 1000000]

Makes indexes (no media) of a mix like that of Long-VITA's stages: captions of one tiled image,
documents, several images, films, short questions of text, mathematics and long texts. Plans it at
three lengths, each in a process of its own, and prints seconds, peak memory, fill, and the costs of
8 replicas.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from model_shapes import QWEN2_7B

from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.data.planning.plan import read_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.samples.records import Kind
from megatron_vita.data.shards.index import (
    SCHEMA,
    IndexHeader,
    SampleIndex,
    index_path,
    text_stamp,
    write_index,
)
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.train import train_sentencepiece
from megatron_vita.training.run.streams import pack_costs, packs_of_replicas

SHARD = 1000
LENGTHS = {16384: 60, 32768: 120, 131072: 500}  # and frames of a film
MIX = {
    "caption": 0.35,
    "document": 0.15,
    "images": 0.1,
    "film": 0.05,
    "text": 0.25,
    "math": 0.08,
    "long": 0.02,
}
SIDES = np.array(
    [(640, 480), (1024, 768), (800, 1200), (500, 375), (448, 448), (1920, 1080), (1700, 2200)]
)
REPLICAS = 8
STEPS = 100


def write_shard(
    path: Path, numbers: np.ndarray, *, kinds: np.ndarray, text: dict[str, str]
) -> None:
    """An index of made-up samples, and an empty file in the shard's place."""
    noise = np.random.default_rng(int(numbers[0]))
    rows = [
        _sample(str(kind), int(number), noise) for kind, number in zip(kinds, numbers, strict=True)
    ]
    header = IndexHeader(shard_size=0, samples=len(rows), content=path.name, **text)
    write_index(
        SampleIndex(pa.Table.from_pylist(rows, schema=SCHEMA), header=header), index_path(path)
    )
    path.touch()


def _sample(kind: str, number: int, noise: np.random.Generator) -> dict:
    # logarithms of median token counts
    words = {"text": 5.3, "math": 5.6, "long": 9.2}.get(kind, 4.8)
    spread = 0.8
    if kind == "long":
        spread = 1.0
    answer = int(np.exp(noise.normal(words, spread))) + 4
    images = {"caption": 1, "document": 1, "images": int(noise.integers(2, 7))}.get(kind, 0)
    films = int(kind == "film")
    sizes = SIDES[noise.integers(0, len(SIDES) - (kind != "document"), images)]
    pieces = [
        (Kind.TEXT, 12),
        *[(Kind.IMAGE, 0)] * images,
        *[(Kind.VIDEO, 0)] * films,
        (Kind.LOSS, answer),
    ]
    duration = 0.0
    if films:
        duration = float(np.clip(np.exp(noise.normal(4.2, 1.0)), 5, 7200))
    return {
        "key": f"{number:08d}", "is_text": False, "record": "",
        "piece_kinds": [int(k) for k, _ in pieces], "piece_tokens": [tokens for _, tokens in pieces],
        "image_widths": sizes[:, 0].tolist(), "image_heights": sizes[:, 1].tolist(),
        "video_durations": [duration] * films, "video_fps": [25.0] * films,
        "video_frames": [int(duration * 25)] * films,
        "member_names": [f"{number:08d}.json"], "member_offsets": [0], "member_sizes": [0],
    }  # fmt: skip


def make_mix(folder: Path, samples: int) -> None:
    """Indexes of all shards; each dataset is a kind."""
    tokenizer_file = folder / "toy.model"
    train_sentencepiece(
        ["a few words to begin with", "and some more of them"] * 20, tokenizer_file, vocab_size=300
    )
    text = text_stamp(ChatFormat(load_tokenizer(str(tokenizer_file))))
    for kind, share in MIX.items():
        for start in range(0, int(samples * share), SHARD):
            numbers = np.arange(start, min(start + SHARD, int(samples * share)))
            path = folder / kind / f"{kind}-{start // SHARD:06d}.tar"
            path.parent.mkdir(exist_ok=True)
            write_shard(path, numbers, kinds=np.full(len(numbers), kind), text=text)


def recipe_of(folder: Path, length: int, **data: object) -> Recipe:
    """A 7B model's recipe at a length."""
    datasets = [{"name": kind, "shards": f"{folder}/{kind}/*.tar"} for kind in MIX]
    return recipe_from_dict(
        {
            "model": {"language": QWEN2_7B},
            "text": {"tokenizer": str(folder / "toy.model")},
            "media": {"max_tiles": 12, "max_frames": LENGTHS[length]},
            "data": {
                "train": datasets,
                "seq_length": length,
                "plan": str(folder / f"plan-{length}"),
                **data,
            },
            "training": {"global_batch_size": 64},
        }
    )


def run_plan(recipe: Recipe, folder: Path) -> tuple[float, float]:
    """Plan in a process of its own, as a user would; returns seconds and peak GiB."""
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(dataclasses.asdict(recipe)))
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "data_tools", "plan", str(file)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("data_tools plan failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def imbalance(recipe: Recipe, *, packs_per_replica: int) -> list[float]:
    """Greatest over mean cost of the replicas, for some steps."""
    recipe = recipe.replaced({"training.global_batch_size": REPLICAS * packs_per_replica})
    plan = read_plan(plan_path(recipe, "train"))
    found = []
    for step in range(min(STEPS, plan.num_packs // recipe.training.global_batch_size)):
        first = step * recipe.training.global_batch_size
        costs = pack_costs(recipe, plan, first=first)
        assignments = packs_of_replicas(recipe, plan, first=first, replicas=REPLICAS)
        sums = [sum(costs[pack - first] for pack in assigned) for assigned in assignments]
        found.append(max(sums) / (sum(sums) / REPLICAS))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    samples = parser.parse_args().samples
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_mix(folder, samples)
        for length in LENGTHS:
            recipe = recipe_of(folder, length)
            seconds, memory = run_plan(recipe, folder)
            plan = read_plan(plan_path(recipe, "train"))
            fill = plan.num_tokens / (plan.num_packs * length)
            many, one = (imbalance(recipe, packs_per_replica=packs) for packs in (8, 1))
            grouped = recipe_of(
                folder, length, group_by_cost=True, plan=str(folder / f"grouped-{length}")
            )
            grouped = grouped.replaced({"training.global_batch_size": REPLICAS})
            run_plan(grouped, folder)
            alike = imbalance(grouped, packs_per_replica=1)
            lines.append(
                f"| {length} | {plan.num_packs} | {seconds:.1f} | {memory:.2f} | {fill:.2%} | "
                f"{np.median(many):.3f} / {max(many):.3f} | {np.median(one):.2f} | "
                f"{np.median(alike):.3f} / {max(alike):.3f} |"
            )
    head = f"{samples} samples; cost of {REPLICAS} replicas, greatest over mean: median / worst of {STEPS} steps"
    columns = "| T | packs | seconds | peak GiB | fill | 8 packs each | 1 pack each | 1 pack each, grouped |"
    sys.stdout.write("\n".join([head, "", columns, "|---" * 8 + "|", *lines, ""]))


if __name__ == "__main__":
    main()
