"""Prompts: a conversation with its images and videos as bytes, laid out as training documents
are."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.samples.documents import Document, assemble_document
from megatron_vita.data.samples.encoding import DocumentFormat, Medium
from megatron_vita.errors import DataError
from megatron_vita.media.images import image_size
from megatron_vita.media.video import VideoInfo
from megatron_vita.text.conversation import check_messages


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
    """Messages as in the chat JSONL; text contents hold the tags `<image>` and `<video>`, or are
    lists of parts."""

    messages: list[dict[str, Any]]
    images: Sequence[MediaFile] = ()
    videos: Sequence[MediaFile] = ()
    cache_salt: bytes = b""  # only prompts with the same one share computed blocks

    @classmethod
    def ask(
        cls, question: str, *, images: Sequence[MediaFile] = (), videos: Sequence[MediaFile] = ()
    ) -> "Prompt":
        """One question after its media; whatever it says is literal text."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images] + [
            {"type": "video"} for _ in videos
        ]
        return cls(
            messages=[{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            images=images,
            videos=videos,
        )


@dataclass(frozen=True, kw_only=True)
class VideoFrames:
    """Which frames of a video the model is shown: seconds from its first frame."""

    name: str
    duration: float
    size: tuple[int, int]  # width and height of its frames; 0 where each has its own
    times: list[float]


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """A prompt in tokens, with its media yet to be decoded."""

    document: Document
    files: list[MediaFile]  # of `document.media`
    videos: list[VideoFrames]
    tile_digests: list[bytes]  # what each tile shows, as far as the cache must know
    cache_salt: bytes = b""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, placeholders included."""
        return len(self.document)

    @property
    def tiles(self) -> int:
        """Image tiles and frames."""
        return len(self.document.placements)

    def block_keys(
        self, block_tokens: int, *, rows_per_tile: int, said: Sequence[int] = ()
    ) -> list[bytes]:
        """Keys of the whole blocks of the prompt followed by the tokens `said`: of what a block
        holds, of all that comes before it, and of the salt."""
        ids = np.concatenate([self.document.input_ids, np.array(said, dtype=np.int64)])
        placements = self.document.placements
        key = self.cache_salt
        keys = []
        for start in range(0, len(ids) - block_tokens + 1, block_tokens):
            stop = start + block_tokens
            state = hashlib.sha256(key + ids[start:stop].tobytes())
            first = np.searchsorted(placements, start - rows_per_tile, side="right")
            for tile in range(int(first), int(np.searchsorted(placements, stop))):
                state.update(self.tile_digests[tile])
            keys.append(key := state.digest())
        return keys


def prepare_prompt(
    prompt: Prompt,
    *,
    form: DocumentFormat,
    probe: Callable[[MediaFile], VideoInfo],
    max_frames: int | None = None,
) -> PreparedPrompt:
    """The prompt's tokens up to where the assistant speaks. DataError if messages or media are
    wrong.

    `probe` tells what kind of video a file is. `max_frames`: of each video at most so many frames,
    where that is less than the recipe's `media.max_frames`.
    """
    sample = {
        "messages": prompt.messages,
        "images": [image.name for image in prompt.images],
        "videos": [video.name for video in prompt.videos],
    }
    turns = form.chat.prompt(check_messages(sample, needs_answer=False))
    infos = [probe(video) for video in prompt.videos]
    most = min(form.media.max_frames, form.media.max_frames if max_frames is None else max_frames)
    shown = [
        form.video(v.name, info, frames=most) for v, info in zip(prompt.videos, infos, strict=True)
    ]
    media = {
        "image": [form.image(i.name, image_size(i.data, i.name)) for i in prompt.images],
        "video": shown,
    }
    document = assemble_document(turns, key="prompt", media=media, form=form)
    images = iter(prompt.images)
    videos = iter(prompt.videos)
    files = [next(videos if medium.grid is None else images) for medium in document.media]
    return PreparedPrompt(
        document=document,
        files=files,
        videos=[
            VideoFrames(
                name=video.name,
                duration=info.duration,
                size=info.size,
                times=medium.times if medium else [],
            )
            for video, info, medium in zip(prompt.videos, infos, shown, strict=True)
        ],
        tile_digests=[
            digest for each in zip(document.media, files, strict=True) for digest in _digests(*each)
        ],
        cache_salt=prompt.cache_salt,
    )


def _digests(medium: Medium, file: MediaFile) -> list[bytes]:
    content = hashlib.sha256(file.data)
    content.update(repr((medium.grid, medium.times)).encode())
    return [content.digest() + tile.to_bytes(4, "little") for tile in range(medium.num_tiles)]
