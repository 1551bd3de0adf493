"""Prompts: a conversation with the bytes of its images and videos, tokenized as training documents
are."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vita.data.samples.documents import Document, assemble_document
from megatron_vita.data.samples.encoding import Medium, SampleEncoder
from megatron_vita.errors import DataError
from megatron_vita.media.images import image_size
from megatron_vita.media.video import VideoInfo
from megatron_vita.text.conversation import check_messages


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """An image or video: its bytes, and a name for error messages."""

    name: str
    data: bytes

    @classmethod
    def read(cls, path: str | Path) -> "MediaFile":
        """Read a local file; DataError if that fails."""
        try:
            return cls(name=str(path), data=Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Chat messages in the format of the chat JSONL. Contents are texts with the tags `<image>` and
    `<video>`, or lists of parts."""

    messages: list[dict[str, Any]]
    images: Sequence[MediaFile] = ()
    videos: Sequence[MediaFile] = ()
    cache_salt: bytes = b""  # only prompts with the same one share computed blocks
    adapter: str = ""  # name of the adapter that answers; empty: the base model

    @classmethod
    def ask(
        cls, question: str, *, images: Sequence[MediaFile] = (), videos: Sequence[MediaFile] = ()
    ) -> "Prompt":
        """Build a prompt of one question after its media; the question is literal text, without
        tags."""
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
    """Timestamps of the frames sampled from a video, in seconds from its first frame."""

    name: str
    duration: float
    size: tuple[int, int]  # width and height of its frames; 0 where each has its own
    times: list[float]


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """A tokenized prompt whose media are probed but not yet decoded."""

    document: Document
    files: list[MediaFile]  # of `document.media`
    videos: list[VideoFrames]
    tile_digests: list[bytes]  # what each tile shows, as far as the cache must know
    cache_salt: bytes = b""
    adapter: str = ""

    @property
    def tokens(self) -> int:
        """Number of prompt tokens, including placeholders of media."""
        return len(self.document)

    @property
    def tiles(self) -> int:
        """Number of image tiles and video frames."""
        return len(self.document.placements)

    def block_keys(
        self, block_tokens: int, *, rows_per_tile: int, said: Sequence[int] = ()
    ) -> list[bytes]:
        """Prefix cache keys of the full blocks of the prompt followed by the generated tokens
        `said`.

        A key is a hash of the cache salt, of the adapter, of all preceding tokens and tiles, and of the block's
        own.
        """
        ids = np.concatenate([self.document.input_ids, np.array(said, dtype=np.int64)])
        placements = self.document.placements
        key = self.cache_salt
        # Its keys and values differ from those of the base.
        if self.adapter:
            key = hashlib.sha256(repr((self.adapter, key)).encode()).digest()
        keys = []
        for start in range(0, len(ids) - block_tokens + 1, block_tokens):
            stop = start + block_tokens
            state = hashlib.sha256(key + ids[start:stop].tobytes())
            # A tile that began in an earlier block may reach into this one.
            first = np.searchsorted(placements, start - rows_per_tile, side="right")
            for tile in range(int(first), int(np.searchsorted(placements, stop))):
                state.update(self.tile_digests[tile])
            # Each key contains the previous one, and thereby everything before the block.
            keys.append(key := state.digest())
        return keys


def prepare_prompt(
    prompt: Prompt,
    *,
    encoder: SampleEncoder,
    probe: Callable[[MediaFile], VideoInfo],
    max_frames: int | None = None,
) -> PreparedPrompt:
    """Tokenize a prompt up to the beginning of the assistant's turn.

    Args:
        probe: returns the metadata of a video file.
        max_frames: limit of frames per video; it can only lower the recipe's `media.max_frames`.

    Raises:
        DataError: messages or media are invalid.
    """
    sample = {
        "messages": prompt.messages,
        "images": [image.name for image in prompt.images],
        "videos": [video.name for video in prompt.videos],
    }
    turns = encoder.chat.prompt(check_messages(sample, needs_answer=False))
    infos = [probe(video) for video in prompt.videos]
    most = min(
        encoder.media.max_frames, encoder.media.max_frames if max_frames is None else max_frames
    )
    shown = [
        encoder.video(v.name, info, frames=most)
        for v, info in zip(prompt.videos, infos, strict=True)
    ]
    media = {
        "image": [encoder.image(i.name, image_size(i.data, i.name)) for i in prompt.images],
        "video": shown,
    }
    document = assemble_document(turns, key="prompt", media=media, encoder=encoder)
    images = iter(prompt.images)
    videos = iter(prompt.videos)
    # Media of the document are in the order of the conversation, images and videos mixed.
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
        adapter=prompt.adapter,
    )


def _digests(medium: Medium, file: MediaFile) -> list[bytes]:
    content = hashlib.sha256(file.data)
    # The same file may be tiled or sampled differently.
    content.update(repr((medium.grid, medium.times)).encode())
    return [content.digest() + tile.to_bytes(4, "little") for tile in range(medium.num_tiles)]
