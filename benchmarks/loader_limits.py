"""Memory of a loader process at a pack of a million tokens, and seconds from a resume to the first
batch.

    python benchmarks/loader_limits.py [--ranks 8 1] [--shards 1000 10000] [--rounds 3]

The pack is one film of 68 minutes (720p, 30 frames a second), 4,048 frames of which are dealt over
the ranks. Memory is the PSS of the process that reads it, watched every 50 ms, over that before it
reads anything. The resume is at pack 1,000,000 of a plan with 8 short texts in each pack, in a
process of its own, whose index and plan files are not in the
page cache: it opens the split, takes the digest of the packs consumed, starts a loader process and
waits for a batch. Prints medians over the rounds.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from video import MINUTES, film, repeated

from data_tools.planning import index_shards, write_plans
from megatron_vita.config import DatasetConfig, Recipe, load_recipe, recipe_from_dict
from megatron_vita.data.datasets import find_shards, find_sources
from megatron_vita.data.loading.loader import read_packs, start_fork_server
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.worker import PackTask
from megatron_vita.data.planning.plan import PackPlan, write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path, plan_stamp
from megatron_vita.data.shards.index import index_path
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.train import train_sentencepiece

FRAMES = 4048
GOP = 250
EXTRA_MINUTES = 8
PACK = 1_000_000
DOCUMENTS = 8
SAMPLES = 1000


class Watch:
    """The most PSS that the loader process of this one has had, in bytes."""

    def __init__(self) -> None:
        self.baseline = 0
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def start(self) -> None:
        """Take the baseline once the process has settled, and watch from then on."""
        (self._process,) = multiprocessing.active_children()
        before = -1
        while before != (now := pss(self._process.pid)) or now < 10**7:
            before = now
            time.sleep(1)
        self.baseline = self.peak = now
        self._thread.start()

    def _look(self) -> None:
        with suppress(ProcessLookupError, FileNotFoundError):  # it ends before this thread does
            while not self._stop.wait(0.05):
                self.peak = max(self.peak, pss(self._process.pid))

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()


def pss(process: int | None) -> int:
    """Bytes of memory, of what it shares its share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def write_sample(
    shard: Path, *, samples: int, question: str, media: dict[str, list[ShardMedia]]
) -> None:
    """A shard of equal samples."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A picture."}]
    with SampleWriter(shard) as writer:
        for i in range(samples):
            writer.write(f"{i:06d}", record={"messages": turns}, media=media)


def make_recipe(folder: Path, **data: Any) -> Recipe:
    """Recipe over all shards of a folder."""
    train_sentencepiece(
        ["What is it? A picture. user assistant"] * 9, folder / "words.model", vocab_size=320
    )
    return recipe_from_dict(
        {
            "text": {"tokenizer": str(folder / "words.model")},
            "media": {"max_fps": 1.0, "max_frames": FRAMES},
            "data": {
                "train": [{"name": "made", "shards": str(folder / "*.tar")}],
                **{"plan": str(folder / "plan"), **data},
            },
        }
    )


def memory(folder: Path, all_ranks: list[int]) -> Iterator[str]:
    """Measure the rows of a table."""
    data = repeated(film(GOP), MINUTES + EXTRA_MINUTES)
    media = {"video": [ShardMedia(".mp4", data)]}
    write_sample(folder / "a.tar", samples=1, question="<video>\nWhat is it?", media=media)
    megabytes = len(data) / 1e6
    del data, media
    recipe = make_recipe(folder, seq_length=2**20)
    index_shards(recipe)
    list(write_plans(recipe, strict=True))
    for ranks in all_ranks:
        watch = Watch()
        stream = open_split(
            recipe,
            split="train",
            tokenizer=load_tokenizer(recipe.text.tokenizer),
            tile_share=(ranks // 2, ranks),
        )
        start = time.perf_counter()
        (pack,) = read_packs(stream, watched(watch), num_workers=1, prefetch=1)
        seconds = time.perf_counter() - start
        watch.stop()
        tiles = pack.batch.tiles.nbytes / 1e6
        used = (watch.peak - watch.baseline) / 1e6
        bar = 2600 / ranks + 300
        yield (
            f"| {ranks} | {len(pack.batch.tiles)} | {tiles:.0f} | {megabytes:.0f} | {watch.baseline / 1e6:.0f} "
            f"| {used:.0f} | {bar:.0f} | {used - tiles:.0f} | {seconds:.0f} |"
        )


def watched(watch: Watch) -> Iterator[PackTask]:
    """Read the first pack while watching memory."""
    watch.start()
    yield PackTask(0)


def make_long_run(folder: Path, shards: int) -> Recipe:
    """Shards (links to one) and their indexes (copies of one), and a plan of more packs than a
    million."""
    first = folder / "made-000000.tar"
    write_sample(first, samples=SAMPLES, question="What is it?", media={})
    recipe = make_recipe(folder, seq_length=1024)
    index_shards(recipe)
    for i in range(1, shards):
        shard = folder / f"made-{i:06d}.tar"
        os.link(first, shard)
        shutil.copyfile(index_path(first), index_path(shard))
    tokenizer = load_tokenizer(recipe.text.tokenizer)
    sources = find_sources(recipe, "train", tokenizer=tokenizer)
    noise = np.random.default_rng(0)
    packs = PACK + 100
    number = packs * DOCUMENTS
    columns = {name: np.full(number, value) for name, value in columns_of(first, recipe).items()}
    columns["pack"] = np.repeat(np.arange(packs), DOCUMENTS)
    columns |= {
        "shard": noise.integers(0, shards, number),
        "row": noise.integers(0, SAMPLES, number),
    }
    stamp = plan_stamp(recipe, "train", tokenizer=tokenizer, sources=sources)
    write_plan(PackPlan(columns, datasets=["made"], stamp=stamp), plan_path(recipe, "train"))
    return recipe


def columns_of(shard: Path, recipe: Recipe) -> dict[str, int]:
    """The columns of a plan's document; all samples of the shard are alike."""
    alone = dataclasses.replace(recipe.data, train=[DatasetConfig(name="made", shards=str(shard))])
    tokenizer = load_tokenizer(recipe.text.tokenizer)
    plan, _ = make_plan(dataclasses.replace(recipe, data=alone), "train", tokenizer=tokenizer)
    return {name: int(column[0]) for name, column in plan.columns.items()}


def first_batch(file: Path) -> dict[str, float]:
    """Measure the seconds of a resume in this process, after all imports."""
    recipe = load_recipe(file)
    tokenizer = load_tokenizer(recipe.text.tokenizer)
    start = time.perf_counter()
    start_fork_server()
    stream = open_split(recipe, split="train", tokenizer=tokenizer, tile_share=(0, 1))
    stream.plan.digest_before(PACK)
    opened = time.perf_counter()
    packs = read_packs(stream, map(PackTask, range(PACK, len(stream))), num_workers=1)
    pack = next(packs)
    done = time.perf_counter()
    assert pack.batch.pack_id == PACK
    packs.close()
    return {"open": opened - start, "read": done - opened}


def forget(recipe: Recipe) -> None:
    """Drop a recipe's files from the page cache."""
    shards = [shard for dataset in recipe.data.train for shard in find_shards(dataset)]
    for path in (plan_path(recipe, "train"), *map(index_path, shards), shards[0]):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resume(folder: Path, shards: int, rounds: int) -> str:
    """Measure one row of a table."""
    folder.mkdir()
    recipe = make_long_run(folder, shards)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(dataclasses.asdict(recipe)))  # JSON is YAML
    found = []
    for _ in range(rounds):
        forget(recipe)
        done = subprocess.run(
            [sys.executable, __file__, "--first-batch", str(file)],
            stdout=subprocess.PIPE,
            check=True,
        )
        found.append(json.loads(done.stdout))
    opened, read = (statistics.median(each[name] for each in found) for name in ("open", "read"))
    total = statistics.median(each["open"] + each["read"] for each in found)
    return f"| {shards} | {opened:.2f} | {read:.2f} | {total:.2f} | {max(e['open'] + e['read'] for e in found):.2f} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 1])
    parser.add_argument("--shards", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-batch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        sys.stdout.write(json.dumps(first_batch(options.first_batch)))
        return
    say = print
    with tempfile.TemporaryDirectory() as name:
        say(
            "| shards | open the split, s | first batch, s | both, s | slowest round |\n|---|---|---|---|---|"
        )
        for shards in options.shards:
            say(resume(Path(name) / str(shards), shards, options.rounds), flush=True)
        say(
            "\n| ranks | frames | tiles, MB | film, MB | PSS before, MB | most over it, MB | bar, MB | not tiles | s |"
        )
        say("|---|---|---|---|---|---|---|---|---|")
        (Path(name) / "film").mkdir()
        for row in memory(Path(name) / "film", options.ranks) if options.ranks else ():
            say(row, flush=True)


if __name__ == "__main__":
    main()
