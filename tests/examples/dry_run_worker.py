"""Dry runs of all recipes of examples/long_vita at their real sizes, on a few samples of real
lengths.

Arguments: a folder, JSON of {size: world sizes}. Writes found.json: the dry run's result and its
seconds for each recipe and world size.
"""

import io
import json
import sys
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_tools.planning import index_shards, write_plans
from data_tools.sharding import ShardJob, make_shards
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.text.train import train_sentencepiece
from megatron_vita.training.dry_report import describe
from megatron_vita.training.dry_run import dry_run

RECIPES = Path(__file__).parents[2] / "examples" / "long_vita"
FILM_SECONDS = 4200


def film() -> bytes:
    """More than an hour at a frame a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = 32
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(FILM_SECONDS):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), i % 256, np.uint8)))
            )
        container.mux(stream.encode())
    return buffer.getvalue()


def write_samples(folder: Path) -> Path:
    """A film, large pictures, and words."""
    folder.mkdir()
    (folder / "film.mp4").write_bytes(film())
    Image.new("RGB", (1800, 1300), "green").save(folder / "picture.png")
    answer = {"role": "assistant", "content": "It is green, and stays so. " * 20}
    samples = [
        {
            "messages": [{"role": "user", "content": "<video>\nWhat happens?"}, answer],
            "videos": ["film.mp4"],
        }
    ]
    for _ in range(6):
        question = {"role": "user", "content": "<image>\nWhat is this?"}
        samples.append({"messages": [question, answer], "images": ["picture.png"]})
        samples.append({"messages": [{"role": "user", "content": "Say it."}, answer]})
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def open_recipe(path: Path, folder: Path, *, packs: int) -> Recipe:
    """The recipe at its real size, on the samples of this test."""
    return load_recipe(
        path,
        [
            f'data.train=[{{name: test, shards: "{folder}/shards/*.tar"}}]',
            f"data.plan={folder}/plans/{path.stem}",
            f"text.tokenizer={folder}/words.model",
            f"data.epochs={packs}",
            "training.train_iters=1",
        ],
    )


def main() -> None:
    """Plans each stage once and dry-runs it for each size of model."""
    folder = Path(sys.argv[1])
    worlds = json.loads(sys.argv[2])
    samples = write_samples(folder / "raw")
    train_sentencepiece([samples.read_text()] * 3, folder / "words.model", vocab_size=330)
    make_shards(
        ShardJob(
            files=[samples],
            media_root=samples.parent,
            out=folder / "shards",
            samples_per_shard=99,
            strict=True,
        )
    )
    found = {}
    for path in sorted(RECIPES.glob("*b/stage*.yaml")):
        recipe = open_recipe(path, folder, packs=load_recipe(path).training.global_batch_size)
        if not (Path(recipe.data.plan) / "train.arrow").exists():
            index_shards(recipe)
            list(write_plans(recipe, strict=True))
        for world_size in worlds[path.parent.name]:
            start = time.perf_counter()
            report = dry_run(recipe, world_size=world_size)
            found[f"{path.parent.name} {path.stem} {world_size}"] = {
                "seconds": time.perf_counter() - start,
                "gib": max(stage.memory.device for stage in report.stages) / 2**30,
                "tokens": [int(pack.tokens.sum()) for pack in report.packs],
                "tiles": [[int(pack.tiles.min()), int(pack.tiles.max())] for pack in report.packs],
                "loss_tokens": [int(pack.loss_tokens.sum()) for pack in report.packs],
                "text": describe(recipe, report, ranks_per_node=8),
            }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
