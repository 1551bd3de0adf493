"""Plain webdataset and Megatron-Energon, each doing what our reader does; run by `loader.py` with
the peers' Python.

    python benchmarks/loader_peers.py {webdataset,energon} FOLDER --batch 4 --length 16384 --warm-up
    2 --batches 8

Imports nothing of this project. Images are decoded and resized by Pillow; films by PyAV, through
Energon's AVDecoder
there. Writes a line of JSON: what it read, its CPU and wall seconds, and a summary of some samples.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import tokenizers
import torch
from PIL import Image

SIDE = 448
ROWS = 256
MAX_TILES = 12
GREY = (123, 116, 103)
Sample = dict[str, Any]


class Encoder:
    """From a sample's JSON and media to token ids, labels and tiles, as most users write it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(
            str(folder / "tokenizer" / "tokenizer.json")
        )

    def __call__(self, sample: Sample) -> Sample:
        """Encode a sample."""
        record = sample["json"]
        tiles: list[np.ndarray] = []
        media: list[list[int]] = []
        for name in record["images"]:
            cut, grid = image_tiles(sample[name.split(".", 1)[1]])
            tiles += cut
            media.append(self._image_ids(*grid))
        for name in record["videos"]:
            frames = film_tiles(sample[name.split(".", 1)[1]])
            tiles += frames
            media.append(self._wrapped("vid") * len(frames))
        ids, labels = self._text(record, iter(media))
        stacked = np.zeros((0, 3, SIDE, SIDE), np.uint8)
        if tiles:
            stacked = np.stack(tiles)
        return {"key": sample["__key__"], "ids": ids, "labels": labels, "tiles": stacked}

    def _text(self, record: Sample, media: Iterator[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        loss: list[bool] = []
        for message in record["messages"]:
            scored = message["role"] == "assistant"
            opening = [self._id("<|im_start|>"), *self._encode(message["role"] + "\n")]
            words: list[int] = []
            for i, part in enumerate(
                message["content"].replace("<video>", "<image>").split("<image>")
            ):
                # A placeholder stands between two parts.
                if i > 0:
                    words += next(media)
                words += self._encode(part)
            words += [self._id("<|im_end|>"), *self._encode("\n")]
            ids += opening + words
            loss += [False] * len(opening) + [scored] * len(words)
        flat = np.array(ids)
        return flat, np.append(np.where(loss[1:], flat[1:], -100), -100)

    def _encode(self, text: str) -> list[int]:
        if text:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return []

    def _id(self, name: str) -> int:
        return self._tokenizer.token_to_id(name)

    def _wrapped(self, kind: str) -> list[int]:
        context = [self._id(f"<{kind.upper()}_CONTEXT>")] * ROWS
        return [self._id(f"<{kind}>"), *context, self._id(f"</{kind}>")]

    def _image_ids(self, cols: int, rows: int) -> list[int]:
        return self._wrapped("img") + (self._encode("\n") + self._wrapped("patch") * cols) * rows


def image_tiles(picture: Image.Image) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Thumbnail and cells of the grid nearest in shape."""
    counts = range(1, MAX_TILES + 1)
    grids = [(cols, rows) for cols in counts for rows in counts if cols * rows <= MAX_TILES]
    aspect = picture.width / picture.height
    cols, rows = min(grids, key=lambda grid: (abs(grid[0] / grid[1] - aspect), -grid[0] * grid[1]))
    large = picture.resize((cols * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    boxes = [
        (x * SIDE, y * SIDE, x * SIDE + SIDE, y * SIDE + SIDE)
        for y in range(rows)
        for x in range(cols)
    ]
    cut = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), *map(large.crop, boxes)]
    return [np.asarray(tile).transpose(2, 0, 1) for tile in cut], (cols, rows)


def film_tiles(film: Any) -> list[np.ndarray]:
    """A frame a second, in the middle of a grey square."""
    if isinstance(film, bytes):
        return [squared(image) for image in plain_frames(film)]
    duration, _ = film.get_video_duration(get_frame_count=False)
    clips, _ = film.get_video_clips([(moment, moment) for moment in moments(duration)])
    return [squared(Image.fromarray(clip[0].permute(1, 2, 0).numpy())) for clip in clips]


def moments(duration: float) -> list[float]:
    """The middles of its seconds."""
    count = int(duration + 1e-6)
    return [(i + 0.5) * duration / count for i in range(count)]


def plain_frames(data: bytes) -> Iterator[Image.Image]:
    """All frames decoded in order in one thread, as loader processes do it; the wanted ones made
    pictures."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = moments(float((stream.duration or 0) * (stream.time_base or 0)))
        taken = 0
        for frame in container.decode(stream):
            if (
                taken < len(wanted)
                and (frame.time or 0.0) + 1 / float(stream.average_rate or 1) > wanted[taken] + 5e-4
            ):
                taken += 1
                yield frame.to_image()


def squared(image: Image.Image) -> np.ndarray:
    """As large as it fits into a tile."""
    wide = SIDE / max(image.size)
    size = (round(image.width * wide), round(image.height * wide))
    square = Image.new("RGB", (SIDE, SIDE), GREY)
    place = ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2)
    square.paste(image.resize(size, Image.Resampling.BICUBIC), place)
    return np.asarray(square).transpose(2, 0, 1)


def collate(samples: list[Sample], length: int) -> Sample:
    """Samples one after another in one sequence, which is padded to `length`."""
    lengths, counts = ([len(sample[name]) for sample in samples] for name in ("ids", "tiles"))
    length = max(length, sum(lengths))
    ids = torch.zeros(length, dtype=torch.int64)
    labels = torch.full((length,), -100)
    for name, tensor in (("ids", ids), ("labels", labels)):
        tensor[: sum(lengths)] = torch.from_numpy(
            np.concatenate([sample[name] for sample in samples])
        )
    tiles = torch.from_numpy(np.concatenate([sample["tiles"] for sample in samples]))
    keys = [sample["key"] for sample in samples]
    return {
        "ids": ids,
        "labels": labels,
        "tiles": tiles,
        "keys": keys,
        "lengths": lengths,
        "counts": counts,
    }


def summaries(pack: Sample) -> Sample:
    """Values that readers must agree on, by key: sums of ids and labels, number of tiles, and the
    mean of two tiles' middles."""
    facts: Sample = {}
    start = 0
    first = 0
    for key, length, count in zip(pack["keys"], pack["lengths"], pack["counts"], strict=True):
        tiles = pack["tiles"][first : first + min(count, 2), :, 120:330, 8:440].double()
        sums = (int(pack[name][start : start + length].sum()) for name in ("ids", "labels"))
        mean = 0.0
        if count:
            mean = float(tiles.mean())
        facts[key] = [*sums, count, mean]
        start = start + length
        first = first + count
    return facts


def webdataset_loader(folder: Path, batch: int, length: int) -> Iterator[Sample]:
    """webdataset in torchdata's StatefulDataLoader."""
    import webdataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).decode("pilrgb")
    packs = (
        samples.map(Encoder(folder))
        .repeat()
        .batched(batch, collation_fn=lambda rows: collate(rows, length))
    )
    return iter(StatefulDataLoader(packs, batch_size=None, num_workers=1, prefetch_factor=2))


def energon_loader(folder: Path, batch: int, length: int) -> Iterator[Sample]:
    """Energon with a task encoder that cooks crude samples."""
    import warnings

    from megatron import energon

    warnings.filterwarnings("ignore")
    encoder = Encoder(folder)

    class Tasks(energon.DefaultTaskEncoder):
        """Encodes and packs."""

        decoder = energon.SampleDecoder(image_decode="pilrgb")
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

        @energon.stateless
        def encode_sample(self, sample: Sample) -> Sample:
            return encoder(sample)

        def batch(self, samples: list[Sample]) -> Sample:
            return collate(samples, length)

    dataset = energon.get_train_dataset(
        str(folder),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=1),
        batch_size=batch,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Tasks(),
    )
    return iter(energon.get_savable_loader(dataset, prefetch_factor=2))


def cpu_seconds() -> float:
    """CPU seconds of this process and all its descendants."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(packs: Iterator[Sample], *, warm_up: int, batches: int) -> Sample:
    """Measure CPU and wall seconds of `batches` packs after `warm_up` ones, with the same number
    read ahead before and after.

    A pack has "ids", "labels" and "tiles", and of each of its samples in turn "keys", "lengths" and
    "counts" (tiles).
    """
    for _ in range(warm_up):
        next(packs)
    cpu = cpu_seconds()
    start = time.perf_counter()
    samples = 0
    tiles = 0
    for _ in range(batches):
        pack = next(packs)
        samples = samples + len(pack["keys"])
        tiles = tiles + len(pack["tiles"])
    cpu = cpu_seconds() - cpu
    wall = time.perf_counter() - start
    facts: Sample = {}
    for _ in range(batches):
        facts |= summaries(next(packs))
    return {"cpu": cpu, "wall": wall, "samples": samples, "tiles": tiles, "facts": facts}


def main() -> None:
    """Read, and print the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=("webdataset", "energon"))
    parser.add_argument("folder", type=Path)
    for option in ("--batch", "--length", "--warm-up", "--batches"):
        parser.add_argument(option, type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loader = {"webdataset": webdataset_loader, "energon": energon_loader}[options.peer]
    packs = loader(options.folder, options.batch, options.length)
    found = measure(packs, warm_up=options.warm_up, batches=options.batches)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()  # Energon's workers take long to end
    os._exit(0)


if __name__ == "__main__":
    main()
