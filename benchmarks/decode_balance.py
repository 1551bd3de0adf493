"""Seconds that each rank of a replica spends on decoding its share of a pack's tiles.

    python benchmarks/decode_balance.py [--ranks 4]

Makes packs of a film (720p, H.264), of photographs (1600 x 1200 JPEG, 13 tiles each) and of both,
and reads each as every rank would, one after another in one process. Prints CPU seconds, and the
slowest rank's over the mean.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_tools.planning import index_shards, write_plans
from data_tools.sharding import ShardJob, make_shards
from megatron_vita.config import DataConfig, DatasetConfig, MediaConfig, Recipe, TextConfig
from megatron_vita.data.loading.open import open_split
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.train import train_sentencepiece

SECONDS = 300
FPS = 10
PHOTOGRAPHS = 24


def film() -> bytes:
    """Moving shapes over noise, 720p, a key frame every 48 frames."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0)
    background = noise.integers(0, 255, (720, 1280, 3), dtype=np.uint8) // 4
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "g": "48"}
        )
        stream.width = 1280
        stream.height = 720
        stream.pix_fmt = "yuv420p"
        for i in range(SECONDS * FPS):
            picture = np.roll(background, 3 * i, axis=1)
            picture[200:500, (7 * i) % 900 : (7 * i) % 900 + 300] = (200, 40, i % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return buffer.getvalue()


def photograph(seed: int) -> bytes:
    """A smooth picture with noise."""
    noise = np.random.default_rng(seed)
    small = Image.fromarray(noise.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((1600, 1200), Image.Resampling.BICUBIC)).astype(np.int16)
    grainy = np.clip(pixels + noise.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pack(folder: Path, name: str, *, films: int, photographs: int) -> Recipe:
    """Write one sample with these media, which fills one pack."""
    raw = folder / f"{name}-raw"
    raw.mkdir()
    (raw / "film.mp4").write_bytes((folder / "film.mp4").read_bytes())
    pictures = [f"{i}.jpg" for i in range(photographs)]
    for i, picture in enumerate(pictures):
        (raw / picture).write_bytes(photograph(i))
    question = "<image>\n" * photographs + "<video>\n" * films + "What is it?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A picture."}]
    lines = raw / "samples.jsonl"
    lines.write_text(
        json.dumps({"messages": turns, "images": pictures, "videos": ["film.mp4"] * films}) + "\n"
    )
    make_shards(
        ShardJob(files=[lines], media_root=raw, out=folder / name, samples_per_shard=9, strict=True)
    )
    recipe = Recipe(
        text=TextConfig(tokenizer=str(folder / "words.model")),
        media=MediaConfig(max_frames=SECONDS),
        data=DataConfig(
            train=[DatasetConfig(name=name, shards=str(folder / name / "*.tar"))],
            plan=str(folder / f"{name}-plan"),
            seq_length=262144,
        ),
    )
    index_shards(recipe)
    list(write_plans(recipe, strict=True))
    return recipe


def measure(recipe: Recipe, ranks: int) -> tuple[list[int], list[float]]:
    """Measure tiles and CPU seconds of each rank."""
    tokenizer = load_tokenizer(recipe.text.tokenizer)
    tiles = []
    seconds = []
    for rank in range(ranks):
        stream = open_split(recipe, split="train", tokenizer=tokenizer, tile_share=(rank, ranks))
        start = time.process_time()
        tiles.append(len(stream[0].tiles))
        seconds.append(time.process_time() - start)
    return tiles, seconds


def main() -> None:
    """Measure all packs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_sentencepiece(
            ["What is it? A picture. user assistant"] * 9, folder / "words.model", vocab_size=320
        )
        (folder / "film.mp4").write_bytes(film())
        lines = [
            "| pack | tiles a rank | CPU seconds a rank | slowest / mean |",
            "|---|---|---|---|",
        ]
        for kind, films, photographs in (
            ("film", 1, 0),
            ("photographs", 0, PHOTOGRAPHS),
            ("both", 1, PHOTOGRAPHS),
        ):
            tiles, seconds = measure(
                write_pack(folder, kind, films=films, photographs=photographs), ranks
            )
            shown = ", ".join(f"{s:.2f}" for s in seconds)
            ratio = max(seconds) / np.mean(seconds)
            lines.append(f"| {kind} | {min(tiles)} to {max(tiles)} | {shown} | {ratio:.3f} |")
        print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
