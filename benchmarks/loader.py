"""Samples and frames that one loader process reads in a CPU second, beside plain webdataset and
Megatron-Energon.

    python benchmarks/loader.py [--rounds 3] [--peer-python VENV/bin/python] [--kinds text
    photographs films]

Makes shards of text chats, of photographs (1600 x 1200 JPEG: 12 tiles and a thumbnail) and of films
(720p H.264, half a minute to a minute long, a frame a second), and reads them as packs with our
reader in one worker process, with webdataset in torchdata's StatefulDataLoader and with Energon, in
processes of their own that take turns. CPU seconds are those of the reading process, of the worker
and of what lies between, once both have warmed up. Checks that all make the same token ids, labels
and tiles of a sample. Prints medians over the rounds.

The peers run by a Python that has them:

    python -m venv VENV && VENV/bin/pip install torch pillow tokenizers psutil webdataset torchdata
    megatron-energon av
"""

import argparse
import dataclasses
import io
import json
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import tokenizers
import torch
from decode_balance import photograph
from loader_peers import measure
from video import film

from data_tools.planning import index_shards, write_plans
from megatron_vita.config import Recipe, load_recipe, recipe_from_dict
from megatron_vita.data.loading.loader import read_packs
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import ReadPack
from megatron_vita.data.loading.worker import PackTask
from megatron_vita.data.planning.plan import read_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import SPECIAL_TOKENS

LENGTH = 16384
SHARD = 50
GOP = 250
COUNTS = {"text": 3000, "photographs": 100, "films": 16}
PACKS = {"text": (5, 50), "photographs": (3, 12), "films": (2, 8)}  # to warm up, to measure
PEERS = ("webdataset", "energon")
HERE = Path(__file__).parent
WORDS = " ".join(pydoc_data.topics.topics.values())
Media = dict[str, list[ShardMedia]]


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE of English, with our special tokens, as a Hugging Face folder."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=12000, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS], trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def words(noise: random.Random, most: int) -> str:
    """Some English."""
    start = noise.randrange(len(WORDS) - 7 * most)
    return WORDS[start : start + noise.randrange(20, 6 * most)].replace("<", "(").strip() + "."


def chat(noise: random.Random, opening: str = "", turns: int = 1) -> dict[str, Any]:
    """Questions and longer answers."""
    contents = [words(noise, 150 if i % 2 else 40) for i in range(2 * turns)]
    contents[0] = opening + contents[0]
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
        ]
    }


def cut_films() -> list[bytes]:
    """A film of a minute, and its beginnings of some GOPs."""
    whole = film(GOP)
    files = []
    for gops in (4, 5, 6, 7):
        file = io.BytesIO()
        seen = 0
        with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format="mp4") as target:
            copy = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                seen += packet.is_keyframe and bool(packet.size)
                if packet.size and seen <= gops:
                    packet.stream = copy
                    target.mux(packet)
        files.append(file.getvalue())
    return files


def samples_of(kind: str) -> Iterator[tuple[dict[str, Any], Media]]:
    """The samples of a kind, without end; pictures and films come again and again."""
    noise = random.Random(kind)
    if kind == "photographs":
        pictures = [ShardMedia(".jpg", photograph(seed)) for seed in range(10)]
        while True:
            yield from ((chat(noise, "<image>\n"), {"image": [picture]}) for picture in pictures)
    if kind == "films":
        films = [ShardMedia(".mp4", data) for data in cut_films()]
        while True:
            yield from ((chat(noise, "<video>\n"), {"video": [one]}) for one in films)
    while True:
        yield chat(noise, turns=noise.randrange(1, 4)), {}


def make_shards(kind: str, folder: Path) -> Recipe:
    """Make shards, indexes and a plan of three epochs."""
    folder.mkdir()
    samples = samples_of(kind)
    size = 10
    if kind == "text":
        size = SHARD
    for start in range(0, COUNTS[kind], size):
        stop = min(start + size, COUNTS[kind])
        with SampleWriter(folder / f"{kind}-{start:06d}.tar") as writer:
            for i in range(start, stop):
                record, media = next(samples)
                writer.write(f"{i:06d}", record=record, media=media)
    train_tokenizer(folder / "tokenizer")
    recipe = recipe_from_dict(
        {
            "text": {"tokenizer": str(folder / "tokenizer")},
            "media": {"max_fps": 1.0, "max_tiles": 12},
            "data": {
                "train": [{"name": kind, "shards": str(folder / "*.tar")}],
                **{
                    "plan": str(folder / "plan"),
                    "seq_length": LENGTH,
                    "epochs": 3,
                    "document_alignment": 1,
                },
            },
        }
    )
    index_shards(recipe)
    list(write_plans(recipe, strict=True))
    (folder / "recipe.yaml").write_text(json.dumps(dataclasses.asdict(recipe)))  # JSON is YAML
    return recipe


def read_ours(folder: Path, *, warm_up: int, batches: int) -> dict[str, Any]:
    """Read with our loader; returns the same record as `loader_peers` does for a peer."""
    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.text.tokenizer)
    stream = open_split(recipe, split="train", tokenizer=tokenizer, tile_share=(0, 1))
    packs = read_packs(stream, map(PackTask, range(len(stream))), num_workers=1)
    return measure(map(told, packs), warm_up=warm_up, batches=batches)


def told(pack: ReadPack) -> dict[str, Any]:
    """Convert a pack to the form that `measure` takes."""
    batch = pack.batch
    count = len(pack.batch.sample_keys)
    ends = torch.searchsorted(batch.placements, batch.document_starts[1 : count + 1].long())
    return {
        **{
            "ids": batch.input_ids,
            "labels": batch.labels,
            "tiles": batch.tiles,
            "keys": batch.sample_keys,
        },
        "lengths": batch.document_starts.diff()[:count].tolist(),
        "counts": ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist(),
    }


def run(command: list[str]) -> dict[str, Any] | None:
    """Run a reader in a process of its own; returns its record, or None if it fails (its error is
    printed)."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        return json.loads(done.stdout.splitlines()[-1])
    return None


def find_peers(python: str) -> list[str]:
    """Find the peers that a Python has; print how to install the missing ones."""
    modules = {"webdataset": "webdataset, torchdata", "energon": "megatron.energon"}
    found = []
    for peer in PEERS:
        command = [python, "-c", f"import av, tokenizers, psutil, PIL, {modules[peer]}"]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            found.append(peer)
        else:
            sys.stderr.write(
                f"{peer} is not measured: {python} lacks {modules[peer]}; see --help for how to get it\n"
            )
    return found


def compare(kind: str, folder: Path, *, python: str, peers: list[str], rounds: int) -> list[str]:
    """Measure the rows of a table."""
    recipe = make_shards(kind, folder)
    if "energon" in peers:
        options = [
            "--non-interactive",
            "--split-ratio",
            "1,0,0",
            "--sample-type",
            "CrudeWebdataset",
        ]
        energon = [python, str(Path(python).with_name("energon")), "prepare", *options, str(folder)]
        subprocess.run(energon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    plan = read_plan(plan_path(recipe, "train"))
    warm_up, batches = PACKS[kind]
    batch = max(1, round(plan.num_documents / plan.num_packs))
    steps = ["--warm-up", str(warm_up), "--batches", str(batches)]
    commands = {"ours": [sys.executable, __file__, "--ours", str(folder), *steps]}
    for peer in peers:
        options = ["--batch", str(batch), "--length", str(LENGTH), *steps]
        commands[peer] = [python, str(HERE / "loader_peers.py"), peer, str(folder), *options]
    found: dict[str, list[dict[str, Any]]] = {reader: [] for reader in commands}
    for _ in range(rounds):
        for reader, command in commands.items():
            found[reader] += filter(None, [run(command)])
    check_same(found)
    return [row(kind, reader, found) for reader in found if found[reader]]


def check_same(found: dict[str, list[dict[str, Any]]]) -> None:
    """Exit unless all readers produced the same values for the samples that two of them report."""
    ours = found["ours"][0]["facts"]
    for reader in PEERS:
        # A peer that is not installed has no results.
        if not found.get(reader):
            continue
        theirs = found[reader][0]["facts"]
        common = ours.keys() & theirs.keys()
        sys.stderr.write(f"{reader}: {len(common)} samples compared\n")
        for key in common:
            same = ours[key][:3] == theirs[key][:3] and abs(ours[key][3] - theirs[key][3]) < 1
            if not same:
                raise SystemExit(f"{reader} made {theirs[key]} of sample {key}, ours {ours[key]}")


def row(kind: str, reader: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of a reader, and what it gets done in a CPU second over what ours does."""

    def middle(of: Callable[[dict[str, Any]], float], name: str = reader) -> float:
        return statistics.median(map(of, found[name]))

    unit = "tiles"
    if kind == "text":
        unit = "samples"
    cost, ours = (middle(lambda r: r["cpu"] / r[unit], name) for name in (reader, "ours"))
    numbers = [
        middle(lambda r: r["samples"] / r["cpu"]),
        middle(lambda r: r["tiles"] / r["cpu"]),
        middle(lambda r: r["samples"] / r["wall"]),
        middle(lambda r: r["tiles"] / r["wall"]),
    ]
    return f"| {kind} | {reader} | {' | '.join(f'{number:.1f}' for number in numbers)} | {cost / ours:.2f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--kinds", nargs="+", choices=list(COUNTS), default=list(COUNTS))
    # For the process of each reader, which this one starts.
    for hidden, kind in (("--ours", Path), ("--warm-up", int), ("--batches", int)):
        parser.add_argument(hidden, help=argparse.SUPPRESS, type=kind)
    options = parser.parse_args()
    if options.ours:
        sys.stdout.write(
            json.dumps(read_ours(options.ours, warm_up=options.warm_up, batches=options.batches))
            + "\n"
        )
        return
    peers = find_peers(options.peer_python)
    sys.stdout.write(
        "| shards of | reader | samples / CPU s | tiles / CPU s | samples / s | tiles / s "
        "| CPU, over ours |\n|---|---|---|---|---|---|---|\n"
    )
    with tempfile.TemporaryDirectory() as name:
        for kind in options.kinds:
            python = options.peer_python
            rows = compare(
                kind, Path(name) / kind, python=python, peers=peers, rounds=options.rounds
            )
            sys.stdout.write("\n".join(rows) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
