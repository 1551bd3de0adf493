"""An engine of a tiny random model, its prompts, and the same answers from whole forward passes."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megatron_vita import platform
from megatron_vita.config import (
    DataConfig,
    LanguageConfig,
    MediaConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TextConfig,
    VisionConfig,
)
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import MediaFile, PreparedPrompt, Prompt
from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.parallel import groups
from megatron_vita.text.train import train_sentencepiece
from tests.media.video_files import clip

WORDS = "what color is the shape in this picture a red circle blue square yes no there two images of cats"


def tiny_recipe(folder: Path, *, parallel: ParallelConfig | None = None) -> Recipe:
    """A model of two layers whose logits are of the size of a trained one's."""
    tokenizer = folder / "tiny.model"
    if not tokenizer.exists():
        train_sentencepiece([WORDS] * 50, tokenizer, vocab_size=320)
    return Recipe(
        model=ModelConfig(
            vision=VisionConfig(
                image_size=16, patch_size=4, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
                layer_scale_init=1.0, init_method_std=0.2,
            ),
            language=LanguageConfig(
                num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
                kv_channels=8, vocab_size=384, init_method_std=0.15,
            ),
        ),
        media=MediaConfig(max_frames=8),
        text=TextConfig(tokenizer=str(tokenizer)),
        data=DataConfig(seq_length=256),
        parallel=parallel or ParallelConfig(),
    )  # fmt: skip


def tiny_engine(folder: Path, *, parallel: ParallelConfig | None = None, **options: Any) -> Engine:
    """An engine with small pages and chunks, unless `options` say otherwise."""
    small = {"chunk_tokens": 24, "busy_chunk_tokens": 8, "page_tokens": 4, "cache_tokens": 2048}
    return Engine(
        tiny_recipe(folder, parallel=parallel), options=EngineOptions(**{**small, **options})
    )


def picture(seed: int, size: tuple[int, int] = (40, 20)) -> MediaFile:
    """Noise as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return MediaFile(name=f"picture-{seed}.png", data=data.getvalue())


@cache
def video(seconds: int = 5) -> MediaFile:
    """A video that gets brighter."""
    return MediaFile(name="clip.mp4", data=clip(frames=25 * seconds))


def prompts() -> list[Prompt]:
    """Prompts with an image of several tiles, with text alone, with two images, and with a video."""
    return [
        Prompt.ask("what color is the shape", images=[picture(1)]),
        Prompt.ask("is there a red circle"),
        Prompt.ask("two images of cats", images=[picture(2), picture(1, (16, 16))]),
        Prompt.ask("what is in this", videos=[video()]),
    ]


def whole_logprobs(engine: Engine, prepared: PreparedPrompt, said: list[int]) -> torch.Tensor:
    """Log-probabilities after the prompt and after each token `said`, from one forward pass without
    cache or chunks: [len(said) + 1, V]. Collective: the training path at the engine's layout."""
    layout = groups.rank_layout()
    ids = np.concatenate([prepared.document.input_ids, np.array(said, dtype=np.int64)])
    padded = torch.from_numpy(np.pad(ids, (0, -len(ids) % (2 * layout.cp_size * layout.tp_size))))
    placements = torch.from_numpy(prepared.document.placements)
    frames = torch.zeros(len(placements), dtype=torch.bool)
    pack = slice_pack(
        padded,
        labels=torch.full_like(padded, -100),
        cu_seqlens=torch.tensor([0, len(padded)], dtype=torch.int32),
        placements=placements,
        frames=frames,
        rows_per_tile=engine.encoder.vision.image_token_length,
        layout=layout,
    )
    tiles = [np.zeros((0, 3, 16, 16), dtype=np.uint8)]
    for medium, file in zip(prepared.document.media, prepared.files, strict=True):
        tiles.append(
            decode_tiles(
                medium,
                file.data,
                name=file.name,
                tiles=range(medium.num_tiles),
                tile_format=engine.encoder.tile_format,
            )
        )
    mine = torch.from_numpy(np.concatenate(tiles))[
        assign_tiles(frames, layout.tile_ranks)[layout.tile_rank]
    ]
    wanted = torch.arange(prepared.tokens - 1, len(ids))
    rows = ((pack.positions[:, None] == wanted).any(1)).nonzero().squeeze(1)
    pixels = normalize(
        mine.to(platform.device()), engine.recipe.media.normalization, dtype=torch.float32
    )
    with torch.no_grad():
        logits = engine.model(pixels, pack.to(platform.device()), wanted_rows=rows)
        result = logits.new_zeros(len(wanted), logits.shape[1])
        result[pack.positions[rows] - prepared.tokens + 1] = logits
        if layout.cp_size > 1:
            dist.all_reduce(result, group=groups.context_group())
    return result[:, : engine.tokenizer.vocab_size].log_softmax(-1).cpu()
