"""Prompts on which a checkpoint is compared with transformers: token ids in turn, a question, an
image of several tiles, a video."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vita.checkpoint.tokenizer_copy import find_tokenizer
from megatron_vita.config import Recipe
from megatron_vita.data.datasets import sample_encoder
from megatron_vita.data.samples.documents import assemble_document
from megatron_vita.data.samples.encoding import Medium, SampleEncoder
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.errors import CheckpointError
from megatron_vita.media.frame_archive import pack_frames
from megatron_vita.media.normalize import normalize
from megatron_vita.media.video import probe_video
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.media_tokens import MEDIA_FORMATS
from megatron_vita.text.vocabulary import open_tokenizer

QUESTION = "What is to be seen here?"
TOKENS = 32
_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A prompt: token ids int64 [t], the place of each tile's first placeholder int64 [N], and the
    tiles, normalized [N, 3, S, S]."""

    name: str
    ids: Tensor
    placements: Tensor
    pixels: Tensor


def make_probes(recipe: Recipe, checkpoint: Path) -> list[Probe]:
    """Token ids in turn; with a tokenizer a question, too; with a tower one about an image and one
    about a video."""
    empty = np.zeros(0, dtype=np.int64)
    side = recipe.model.vision.image_size
    no_tiles = np.zeros((0, 3, side, side), dtype=np.uint8)
    encoder = encoder_of(recipe, checkpoint)
    prompts = [(f"{TOKENS} tokens", _in_turn(recipe, encoder), empty, no_tiles)]
    if encoder is not None:
        prompts.append(("a question", question_ids(encoder), empty, no_tiles))
        prompts += [] if encoder.text_only else [_about_image(encoder), _about_video(encoder)]
    return [
        Probe(
            name=name,
            ids=torch.from_numpy(ids[: len(ids) // 2 * 2]),  # two chunks of equal length
            placements=torch.from_numpy(placements),
            pixels=normalize(torch.from_numpy(tiles), recipe.media.normalization),
        )
        for name, ids, placements, tiles in prompts
    ]


def _in_turn(recipe: Recipe, encoder: SampleEncoder | None) -> np.ndarray:
    """The first token ids of the vocabulary, int64 [TOKENS]."""
    ids = np.arange(recipe.model.language.vocab_size)
    # A placeholder without pixels is an error in an export's own code.
    if encoder is not None and not encoder.text_only:
        media = MEDIA_FORMATS[recipe.text.media_format].special_tokens
        ids = np.setdiff1d(ids, [encoder.tokenizer.special_id(name) for name in media])
    return np.resize(ids, TOKENS)


def encoder_of(recipe: Recipe, checkpoint: Path) -> SampleEncoder | None:
    """Return the sample encoder of a checkpoint; None if it has no tokenizer."""
    if not recipe.text.tokenizer:
        return None
    try:
        folder = Path(find_tokenizer(checkpoint, recipe.text.tokenizer))
    except CheckpointError:
        return None
    return sample_encoder(recipe, open_tokenizer(recipe, folder=folder))


def question_ids(encoder: SampleEncoder) -> np.ndarray:
    """The prompt of `QUESTION`, int64 [t]."""
    turns = encoder.chat.prompt(
        check_messages({"messages": [{"role": "user", "content": QUESTION}]}, needs_answer=False)
    )
    return assemble_document(turns, key="", media={}, encoder=encoder).input_ids


def _about_image(encoder: SampleEncoder) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """An image twice as wide as high, which is cut into two tiles where the recipe allows it."""
    side = encoder.vision.image_size
    data = _picture(2 * side, side, brightness=0)
    return _asked(encoder, encoder.image("image", (2 * side, side)), data)


def _about_video(encoder: SampleEncoder) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    side = encoder.vision.image_size
    frames = [(f"{i}.png", _picture(side, side, brightness=90 * i)) for i in range(_FRAMES)]
    data = pack_frames(frames, fps=min(1.0, encoder.media.max_fps))
    return _asked(encoder, encoder.video("video", probe_video(data, "video")), data)


def _asked(
    encoder: SampleEncoder, medium: Medium | None, data: bytes
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """A question after a medium: its name, token ids, placements and tiles."""
    assert medium is not None, "nothing is left out"
    kind = medium.member
    content = [{"type": kind}, {"type": "text", "text": QUESTION}]
    sample = {"messages": [{"role": "user", "content": content}], f"{kind}s": [kind]}
    turns = encoder.chat.prompt(check_messages(sample, needs_answer=False))
    document = assemble_document(turns, key="", media={kind: [medium]}, encoder=encoder)
    tiles = decode_tiles(
        medium, data, name=kind, tiles=range(medium.num_tiles), tile_format=encoder.tile_format
    )
    named = {"image": "an image of {} tiles", "video": "a video of {} frames"}[kind]
    return named.format(medium.num_tiles), document.input_ids, document.placements, tiles


def _picture(width: int, height: int, *, brightness: int) -> bytes:
    """A PNG whose colours differ everywhere."""
    across = np.linspace(0, 255, width)[None, :]
    down = np.linspace(0, 255, height)[:, None]
    both = np.broadcast_arrays(across, down, (across + down) / 2)
    colors = (np.stack(both, axis=-1) + brightness) % 256
    file = io.BytesIO()
    Image.fromarray(colors.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
