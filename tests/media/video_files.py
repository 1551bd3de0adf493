"""Video files for the tests of media."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np


@contextmanager
def same_scheduling() -> Iterator[None]:
    """Restore the thread's scheduling at the end.

    SVT-AV1's encoder gives the thread that opens it real-time priority if it may, as for root, and
    leaves it so. All later tests of the process and their children would then starve the others.
    """
    policy = os.sched_getscheduler(0)
    parameters = os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def clip(
    file_format: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 60,
    size: tuple[int, int] = (64, 64),
    stamps: Callable[[int], int] = lambda index: index,
    **options: Any,
) -> bytes:
    """A video of 25 frames a second with a key frame every `gop` (10): frame i has brightness 4 *
    i, or is painted."""
    file = io.BytesIO()
    with same_scheduling(), av.open(file, "w", format=file_format) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options.pop("options", {}))
        if codec == "libx264":
            # The same bytes in half the CPU time: the pictures are too small to share.
            stream.codec_context.thread_count = 1
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = options.get("gop", 10)
        if rotation := options.get("rotation"):
            stream.set_display_rotation(rotation)
        if matrix := options.get("matrix"):
            stream.set_display_matrix(matrix)
        for index in range(frames):
            picture = np.full((size[1], size[0], 3), index * 4 % 256, np.uint8)
            if paint := options.get("paint"):
                paint(picture, index)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamps(index)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def damage(data: bytes, which: range) -> bytes:
    """Overwrites what some packets hold, not the container's own words around them."""
    damaged = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        contents = [
            (packet.pos or 0, bytes(packet)) for packet in container.demux(video=0) if packet.size
        ]
    for position, content in contents[which.start : which.stop]:
        start = data.index(content, position)
        damaged[start : start + len(content)] = b"\xff" * len(content)
    return bytes(damaged)
