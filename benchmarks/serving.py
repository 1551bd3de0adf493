"""Prefill, decode and time to first token of the engine at real shapes, with random weights and
pixels.

    torchrun --nproc_per_node 2 benchmarks/serving.py --shape qwen2.5-7b --tp 2 --lengths
    131072,1048576

A prompt is a film of one frame for each 258 tokens; its pixels are drawn before the clock starts,
so that vision is in the times and decoding of pixels is not. Prefill is from the request to its
first token; a first pass over another film of two chunks compiles kernels. TFLOP/s are those of the
language model's matrices and of causal attention, per GPU. `--first-token` adds prompts of one
image.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from serving_shapes import ROWS_OF_FRAME, SHAPES, causal_flops

from megatron_vita import platform
from megatron_vita.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TextConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_vita.data.samples.documents import Document
from megatron_vita.data.samples.encoding import Medium
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import MediaFile, PreparedPrompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.inference.vision.tile_decoder import TileDecoder, TileKey
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.text.train import train_sentencepiece

GIB = 1 << 30


class RandomPixels(TileDecoder):
    """Tiles that are there at once."""

    def __init__(self, readers: DecodePool) -> None:
        super().__init__(readers)
        size = readers.tile_format.size
        self._pixels = np.random.default_rng(0).integers(
            0, 256, (512, 3, size, size), dtype=np.uint8
        )

    def begin(self, sequence: int, tiles: Sequence[int]) -> None:
        """Nothing is to be done."""

    def take(self, tiles: Sequence[TileKey]) -> tuple[np.ndarray, dict[int, str]]:
        """Any of them."""
        return self._pixels[: len(tiles)], {}


def recipe_of(shape: str, *, tp: int, cp: int, longest: int) -> Recipe:
    """The recipe of a shape with InternViT-300M (in small for `tiny`)."""
    tokenizer = Path(tempfile.gettempdir()) / f"benchmark-{dist.get_rank()}.model"
    train_sentencepiece(["a film of what is in this picture"] * 50, tokenizer, vocab_size=300)
    small = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    return Recipe(
        model=ModelConfig(
            vision=VisionConfig(**(small if shape == "tiny" else {})),  # type: ignore[arg-type]
            language=SHAPES[shape],
        ),
        text=TextConfig(tokenizer=str(tokenizer)),
        data=DataConfig(seq_length=longest + 4096),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp),
        training=TrainingConfig(bf16=platform.on_cuda(), vision_tiles_at_once=64),
    )  # fmt: skip


def film(length: int, *, seed: int) -> PreparedPrompt:
    """A prompt of `length` tokens: as many frames as fit, then text."""
    frames = length // ROWS_OF_FRAME
    ids = np.random.default_rng(seed).integers(4, 250, length)
    document = Document(
        key="film",
        input_ids=ids,
        labels=np.full(length, IGNORED_LABEL),
        placements=np.arange(frames) * ROWS_OF_FRAME + 1,
        media=[Medium("film", frames, None, [float(i) for i in range(frames)])] if frames else [],
    )
    files = [MediaFile(name="film", data=bytes([seed]))]
    return PreparedPrompt(
        document=document,
        files=files[: len(document.media)],
        videos=[],
        tile_digests=[bytes([seed])] * frames,
    )


def image(tiles: int, *, seed: int) -> PreparedPrompt:
    """A prompt of one image of so many tiles and 32 tokens of text."""
    prompt = film(tiles * ROWS_OF_FRAME + 32, seed=seed)
    assert len(prompt.document.placements) == tiles
    return prompt


def run(engine: Engine, prompt: PreparedPrompt, *, tokens: int) -> tuple[float, list[float]]:
    """Measure the seconds to the first token, and of each later one."""
    platform.on_cuda() and torch.cuda.synchronize()
    start = time.perf_counter()
    number = engine.add(prompt, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    moments = []
    while engine.has_work:
        moments += [time.perf_counter() for piece in engine.step() if piece.token_ids]
    engine.forget(number)
    return moments[0] - start, np.diff(moments).tolist()


def long_prompts(engine: Engine, options: argparse.Namespace) -> list[str]:
    """Measure one row for each length."""
    rows = []
    for seed, length in enumerate(options.lengths, start=2):
        first, later = run(engine, film(length, seed=seed), tokens=options.tokens)
        rate = causal_flops(options.shape, length) / first / dist.get_world_size() / 1e12
        step = statistics.median(later)
        memory = torch.cuda.max_memory_allocated() / GIB if platform.on_cuda() else 0.0
        rows.append(
            f"| {options.shape} | {options.tp} x {options.cp} | {length} | {length // ROWS_OF_FRAME} | {first:.2f} | "
            f"{rate:.0f} | {1e3 * step:.2f} | {1 / step:.1f} | {memory:.1f} |"
        )
        print(rows[-1], flush=True)  # noqa: T201
    return rows


def first_tokens(engine: Engine, options: argparse.Namespace) -> list[str]:
    """Measure one row for each number of tiles: medians of 9 images."""
    rows = []
    for tiles in (1, 13):
        times = [run(engine, image(tiles, seed=10 * tiles + i), tokens=2)[0] for i in range(12)]
        rows.append(
            f"| {options.tp} x {options.cp} | {tiles} | {1e3 * statistics.median(times[3:]):.1f} |"
        )
        print(rows[-1], flush=True)  # noqa: T201
    return rows


def main() -> None:
    """Run all ranks; rank 0 measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(part) for part in text.split(",") if part],
        default=[4096],
    )
    parser.add_argument("--tokens", type=int, default=65, help="new tokens after each prompt")
    parser.add_argument("--chunk-tokens", type=int, default=32768)
    parser.add_argument("--cache-dtype", default="model")
    parser.add_argument("--first-token", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    platform.initialize_process()
    longest = max([*options.lengths, 4096])
    engine = Engine(
        recipe_of(options.shape, tp=options.tp, cp=options.cp, longest=longest),
        options=EngineOptions(
            chunk_tokens=options.chunk_tokens,
            cache_tokens=longest + 8192,
            cache_dtype=options.cache_dtype,
        ),
    )
    engine.worker.features.decoder = RandomPixels(engine.worker.features.decoder.readers)
    if dist.get_rank():
        engine.serve_as_worker()
    else:
        run(engine, film(min(2 * options.chunk_tokens, longest), seed=1), tokens=4)
        rows = long_prompts(engine, options)
        if options.first_token:
            rows += first_tokens(engine, options)
        engine.close()
        if options.out:
            with options.out.open("a") as file:
                file.write("\n".join(rows) + "\n")
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
