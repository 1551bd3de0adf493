"""Images a second on one core: from a JPEG file to the tiles of dynamic tiling, beside Pillow and
Hugging Face.

    python benchmarks/images.py [--rounds 7]

Every way takes the same file to the same 12 tiles and thumbnail of 448 pixels, as 8-bit values.
Hugging Face's fast processor needs torchvision; without it, its row is left out. Prints medians of
CPU seconds over rounds in which the ways take turns, and how far pixels are from Pillow's.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from megatron_vita.media.images import open_image, read_pixels
from megatron_vita.media.tiling import Tiling, choose_grid, cut_tiles, grids_of, num_tiles

try:
    import torchvision  # noqa: F401
    from transformers import GotOcr2ImageProcessor
except ImportError:
    GotOcr2ImageProcessor = None

SIDE = 448
GRID = (4, 3)
TILING = Tiling(SIDE, grids_of(1, 12))
Way = Callable[[bytes], np.ndarray]


def photograph(size: tuple[int, int], **options: object) -> bytes:
    """A JPEG with detail at all scales and grain, of the bytes a pixel that cameras give."""
    noise = np.random.default_rng(0)
    pixels = np.full((size[1], size[0], 3), 128.0, dtype=np.float32)
    for cells, strength in ((6, 50), (24, 30), (96, 16), (384, 10), (1536, 6)):
        small = Image.fromarray(noise.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        large = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels += (large - 128) * (strength / 64)
    pixels += noise.normal(0, 2, (size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=90, subsampling=2, **options
    )
    return file.getvalue()


def ours(data: bytes) -> np.ndarray:
    """Decode and tile as training and serving do."""
    pixels = read_pixels(data, "photograph.jpg")
    grid = choose_grid(pixels.size, TILING)
    out = np.empty((num_tiles(grid), 3, SIDE, SIDE), dtype=np.uint8)
    cut_tiles(pixels, grid, tiling=TILING, tiles=range(len(out)), out=out)
    return out


def pillow(data: bytes) -> np.ndarray:
    """The reference: decoded, turned and resized by Pillow."""
    image = upright(data)
    return cells(image, image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pillow_draft(data: bytes) -> np.ndarray:
    """Pillow with JPEGs decoded at a part of their size, as `Image.draft` does: another picture."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (GRID[0] * SIDE, GRID[1] * SIDE))
    return cells(image, image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def simplejpeg_pillow(data: bytes) -> np.ndarray:
    """Decoded by simplejpeg, resized by Pillow."""
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False))
    return cells(image, image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def upright(data: bytes) -> Image.Image:
    """By Pillow alone."""
    image = Image.open(io.BytesIO(data))
    if image.getexif().get(0x0112) == 6:
        return image.transpose(Image.Transpose.ROTATE_270)
    return image


def cells(image: Image.Image, thumbnail: Image.Image) -> np.ndarray:
    """The thumbnail and the cells of the grid that suits the image."""
    cols, rows = GRID
    if image.width <= image.height:
        rows, cols = GRID
    canvas = np.asarray(image.resize((cols * SIDE, rows * SIDE), Image.Resampling.BICUBIC))
    parts = (
        canvas.reshape(rows, SIDE, cols, SIDE, 3)
        .transpose(0, 2, 4, 1, 3)
        .reshape(-1, 3, SIDE, SIDE)
    )
    return np.concatenate([np.asarray(thumbnail).transpose(2, 0, 1)[None], parts])


def hugging_face(kind: type) -> Way:
    """A processor for InternVL up to 8-bit tiles; its thumbnail comes last."""
    size = {"height": SIDE, "width": SIDE}
    processor = kind(
        size=size,
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        do_rescale=False,
        do_normalize=False,
    )

    def tiles(data: bytes) -> np.ndarray:
        found = np.asarray(processor(upright(data), return_tensors="pt")["pixel_values"])
        return np.concatenate([found[-1:], found[:-1]])

    return tiles


def measure(ways: dict[str, Way], data: bytes, rounds: int) -> list[str]:
    """Measure one row for each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way(data)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = pillow(data).astype(np.int16)
    rows = []
    for name, way in ways.items():
        difference = np.abs(way(data).astype(np.int16) - reference)
        ratio = medians["Pillow"] / medians[name]
        rows.append(
            f"| {name} | {medians[name] * 1000:.0f} | {1 / medians[name]:.1f} | {ratio:.2f} | {difference.max()} | "
            f"{difference.mean():.3f} | {(difference == 0).mean():.2%} |"
        )
    return rows


def main() -> None:
    """Measure all ways on three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ways: dict[str, Way] = {
        "megatron_vita": ours,
        "Pillow": pillow,
        "simplejpeg, then Pillow": simplejpeg_pillow,
        "Pillow, draft": pillow_draft,
        "Hugging Face, Pillow": hugging_face(GotOcr2ImageProcessorPil),
    }
    if GotOcr2ImageProcessor is not None:
        ways["Hugging Face, torchvision"] = hugging_face(GotOcr2ImageProcessor)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "4000 x 3000": photograph((4000, 3000)),
        "1600 x 1200": photograph((1600, 1200)),
        "4000 x 3000, to be turned by EXIF": photograph((4000, 3000), exif=exif),
    }
    for name, data in files.items():
        turned = open_image(data, name).height > open_image(data, name).width
        chosen = {
            key: way
            for key, way in ways.items()
            if not (turned and way is not ours and way is not pillow)
        }
        print(f"\n{name}, {len(data) / 1e6:.2f} MB\n")  # noqa: T201
        print("| way | CPU ms | images/s | speed / Pillow's | largest difference | mean | equal |")  # noqa: T201
        print("|---|---|---|---|---|---|---|")  # noqa: T201
        print("\n".join(measure(chosen, data, rounds)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
