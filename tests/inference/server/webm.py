"""A film that browsers can show: a red circle that moves from left to right."""

import io

import av
import numpy as np
from PIL import Image, ImageDraw

FPS = 10
WIDTH = 320
HEIGHT = 180


def webm(*, seconds: int) -> bytes:
    """VP8 in WebM."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream(
            "libvpx", rate=FPS, options={"deadline": "realtime", "cpu-used": "8"}
        )
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        frames = seconds * FPS
        for index in range(frames):
            x = 20 + (WIDTH - 40) * index / frames
            picture = Image.new("RGB", (WIDTH, HEIGHT), "#cfe8e4")
            ImageDraw.Draw(picture).ellipse((x - 20, 70, x + 20, 110), fill="#d1495b")
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24"))
            )
        container.mux(stream.encode())
    return file.getvalue()
