"""Small stand-ins for the packages of the four stages: stamps and clips."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

from examples.four_stages.films import CLIPS

CLIP_SECONDS = 20


def write_material(folder: Path) -> Path:
    """Write stamps of two categories and a clip of one color for each name; returns the folder."""
    for category in ("animals", "food"):
        (folder / "stamps" / category / "kinds").mkdir(parents=True)
        for number in range(8):
            path = folder / "stamps" / category / "kinds" / f"{number}.png"
            Image.new("RGBA", (60, 40 + number), (20 * number, 90, 30, 255)).save(path)
            path.with_suffix(".txt").write_text(f"Some {category}, {number}.\nde.utf8=Etwas.\n")
    (folder / "clips").mkdir()
    for place, name in enumerate(CLIPS):
        _write_clip(folder / "clips" / name, channel=place)
    return folder


def _write_clip(path: Path, *, channel: int) -> None:
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[..., channel] = 200
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = 96
        stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(CLIP_SECONDS):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
