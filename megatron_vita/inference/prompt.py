"""Prompts: a conversation with its images and videos as bytes, laid out as training documents are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.documents import Document, assemble_document, decode_tiles
from megatron_vita.data.form import DocumentFormat
from megatron_vita.errors import DataError
from megatron_vita.media.images import image_size
from megatron_vita.media.video import probe_video
from megatron_vita.text.conversation import check_messages
from megatron_vita.text.template import encode_turns, generation_prompt


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """An image or video: its bytes, and the name that errors use."""

    name: str
    data: bytes

    @classmethod
    def read(cls, path: str | Path) -> "MediaFile":
        """A file on this machine; DataError if it cannot be read."""
        try:
            return cls(name=str(path), data=Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Messages as in the chat JSONL; text contents hold the tags `<image>` and `<video>`, or are lists of parts."""

    messages: list[dict[str, Any]]
    images: Sequence[MediaFile] = ()
    videos: Sequence[MediaFile] = ()

    @classmethod
    def ask(cls, question: str, *, images: Sequence[MediaFile] = (), videos: Sequence[MediaFile] = ()) -> "Prompt":
        """One question after its media; whatever it says is literal text."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
        text = f"\n{question}" if parts else question
        return cls(
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            images=images,
            videos=videos,
        )


def lay_out_prompt(prompt: Prompt, *, form: DocumentFormat) -> Document:
    """The prompt's tokens up to where the assistant speaks. DataError if messages or media are wrong."""
    sample = {
        "messages": prompt.messages,
        "images": [image.name for image in prompt.images],
        "videos": [video.name for video in prompt.videos],
    }
    media = {
        "image": [form.image(i.name, image_size(i.data, i.name)) for i in prompt.images],
        "video": [form.video(v.name, probe_video(v.data, v.name)) for v in prompt.videos],
    }
    turns = encode_turns(check_messages(sample, needs_answer=False), form.tokenizer, form.template)
    document = assemble_document(turns, key="prompt", media=media, form=form)
    opening = generation_prompt(form.template, form.tokenizer)
    return replace(document, input_ids=np.concatenate([document.input_ids, np.array(opening, dtype=np.int64)]))


def prompt_tiles(prompt: Prompt, document: Document, *, form: DocumentFormat) -> np.ndarray:
    """All tiles of a prompt in the order of its placements: uint8 [N, 3, S, S]."""
    images, videos = iter(prompt.images), iter(prompt.videos)
    size = form.vision.image_size
    tiles = [np.zeros((0, 3, size, size), dtype=np.uint8)]
    for medium in document.media:
        file = next(images if medium.grid is not None else videos)
        tiles.append(decode_tiles(medium, file.data, name=file.name, tiles=range(medium.num_tiles), form=form))
    return np.concatenate(tiles)
