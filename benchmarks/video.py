"""Video on one core: frames at 1 a second from 720p H.264, and an hour read by 8 readers.

    python benchmarks/video.py [--rounds 5] [--readers 8]

Films of a minute are made with key frames every 250 and every 30 of 30 frames a second; the hour is
the minute's packets 60 times over. Beside ours, every frame is decoded by PyAV and the wanted ones
are resized by Pillow. Prints medians of CPU seconds over rounds in which the two take turns, and of
each reader those beside one reader's alone.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

import av
import numpy as np
import torch
from PIL import Image

from megatron_vita.media.normalization import mean_color
from megatron_vita.media.video import decode_frames, frame_times, probe_video

FPS = 30
SECONDS = 60
MINUTES = 60
SIDE = 448
WIDTH = 1280
HEIGHT = 720


def film(gop: int) -> bytes:
    """A camera that pans over detail of all scales, a moving patch, and grain."""
    noise = np.random.default_rng(0)
    scene = np.full((1080, 2560, 3), 128.0, dtype=np.float32)
    for cells, strength in ((10, 60), (60, 40), (400, 20)):
        small = Image.fromarray(noise.integers(0, 256, (cells // 2, cells, 3), dtype=np.uint8))
        scene += (np.asarray(small.resize((2560, 1080), Image.Resampling.BICUBIC)) - 128.0) * (
            strength / 128
        )
    background = scene.clip(0, 245).astype(np.uint8)
    grain = noise.integers(0, 8, (8, HEIGHT, WIDTH, 1), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"preset": "veryfast", "crf": "26", "g": str(gop)}
        )
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        for i in range(SECONDS * FPS):
            x = int(640 + 630 * np.sin(i / 200))
            y = int(180 + 170 * np.sin(i / 130))
            picture = background[y : y + HEIGHT, x : x + WIDTH] + grain[i % 8]
            picture[200:500, 5 * i % 1000 : 5 * i % 1000 + 250] = (200, 40, i % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return file.getvalue()


def repeated(data: bytes, times: int) -> bytes:
    """The packets of a film over and over, as one film."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        stamps = [(packet.pts or 0, packet.dts or 0) for packet in packets]
        length = round(SECONDS / float(stream.time_base or 1))
        for i in range(times):
            for packet, (pts, dts) in zip(packets, stamps, strict=True):
                packet.stream = copy
                packet.time_base = stream.time_base
                packet.pts = pts + i * length
                packet.dts = dts + i * length
                target.mux(packet)
    return file.getvalue()


def ours(data: bytes, times: list[float]) -> np.ndarray:
    """Read frames as training and serving do."""
    return decode_frames(data, "film", times=times, tile_size=SIDE)


def plain(data: bytes, times: list[float]) -> np.ndarray:
    """Decode all frames in one thread, pad the wanted ones to a square, and resize them by Pillow."""
    tiles = []
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            if len(tiles) < len(times) and (frame.time or 0.0) + 1 / FPS > times[len(tiles)] + 5e-4:
                square = Image.new("RGB", (WIDTH, WIDTH), mean_color("imagenet"))
                square.paste(frame.to_image(), (0, (WIDTH - HEIGHT) // 2))
                tiles.append(
                    np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(
                        2, 0, 1
                    )
                )
    return np.stack(tiles)


def seconds_of(call: Callable[[], object]) -> float:
    """Measure a call's CPU seconds."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(data: bytes, name: str, rounds: int) -> str:
    """Measure one row of a table."""
    times = frame_times(probe_video(data, name), max_fps=1, max_frames=10**6)
    pairs = [
        (seconds_of(lambda: ours(data, times)), seconds_of(lambda: plain(data, times)))
        for _ in range(rounds)
    ]
    mine, other = (statistics.median(values) for values in zip(*pairs, strict=True))
    inner = slice(104, -104)  # plain blends the padding's edge with the picture
    difference = np.abs(
        ours(data, times)[:, :, inner].astype(int) - plain(data, times)[:, :, inner]
    ).max()
    return (
        f"| {name} | {len(data) / 1e6:.1f} | {mine:.2f} | {SECONDS / mine:.0f} | {other:.2f} | {SECONDS / other:.0f} | "
        f"{other / mine:.2f} | {difference} |"
    )


def split(data: bytes, name: str, readers: int) -> str:
    """Measure one row of a table."""
    probe = seconds_of(lambda: probe_video(data, name))
    times = frame_times(probe_video(data, name), max_fps=1, max_frames=10**6)
    share = -(-len(times) // readers)
    parts = [times[start : start + share] for start in range(0, len(times), share)]
    each = [seconds_of(lambda part=part: ours(data, part)) for part in parts]
    alone = seconds_of(lambda: ours(data, times))
    return (
        f"| {name} | {len(data) / 1e6:.0f} | {probe:.2f} | {alone:.1f} | {statistics.median(each):.2f} | "
        f"{max(each):.2f} | 1 / {alone / max(each):.2f} |"
    )


def main() -> None:
    """Measure both films and both hours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--readers", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    films = {f"key frame every {gop}": film(gop) for gop in (250, 30)}
    say = print
    say(
        "| film of a minute | MB | CPU s | x real time | plain: CPU s | x real time | plain / ours | difference |"
    )
    say("|---|---|---|---|---|---|---|---|")
    for name, data in films.items():
        say(compare(data, name, options.rounds), flush=True)
    say(
        "\n| film of an hour | MB | probe, CPU s | alone | median reader | slowest reader | slowest / alone |"
    )
    say("|---|---|---|---|---|---|---|")
    for name, data in films.items():
        say(split(repeated(data, MINUTES), name, options.readers), flush=True)


if __name__ == "__main__":
    main()
