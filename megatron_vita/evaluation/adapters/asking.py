"""Client of a server for harnesses: prompt parts in, answer text out."""

import io
import logging
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai

from megatron_vita.evaluation.adapters.prompt_rules import MAX_NEW_TOKENS, Part, clean_answer
from megatron_vita.media.data_urls import data_url

logger = logging.getLogger(__name__)
_SECONDS = 3600.0  # prefill of a million tokens may take minutes, and requests may queue


class HarnessClient:
    """Client for greedy answers of at most `max_new_tokens` tokens.

    The key is the environment's VITA_API_KEY or OPENAI_API_KEY.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_frames: int | None = None,
    ) -> None:
        """Connect to a server.

        Args:
            base_url: base URL of the protocol, ending in /v1.
            model: name of the model; None for the server's first.
            max_new_tokens: limit of an answer.
            max_frames: frames of a video, an extension of our server.
        """
        # The openai package insists on a key, also for servers that need none.
        key = os.environ.get("VITA_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=_SECONDS)
        self.model = model or next(iter(self._client.models.list())).id
        self._options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0.0}
        if max_frames is not None:
            self._options["extra_body"] = {"max_frames": max_frames}

    def answer(self, messages: Iterable[tuple[str, list[Part]]]) -> str:
        """Return the answer to messages (role, parts); "" for a refused prompt, with a logged
        warning."""
        request: Any = [
            {"role": role, "content": [_content(part) for part in parts]}
            for role, parts in messages
        ]
        try:
            response = self._client.chat.completions.create(
                model=self.model, messages=request, **self._options
            )
        # One prompt that is too long must not end a benchmark of thousands; an unreachable server
        # must.
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            logger.warning("a prompt is refused and counts as not answered: %s", error)
            return ""
        return clean_answer(response.choices[0].message.content or "")


def _content(part: Part) -> dict[str, Any]:
    """Convert a part to the protocol; media may be a path, a URL, bytes, or a Pillow image."""
    if part.kind == "text":
        return {"type": "text", "text": part.value}
    if isinstance(part.value, str) and part.value.startswith(("http://", "https://", "data:")):
        url = part.value
    else:
        data = _bytes_of(part.value)
        # Harnesses also pass single frames as videos.
        if part.kind == "video" and data.startswith((b"\x89PNG", b"\xff\xd8\xff")):
            data = _video_of_one(data)
        url = data_url(data, part.kind)
    return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": url}}


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        return Path(value).read_bytes()
    file = io.BytesIO()
    value.save(file, "PNG")
    return file.getvalue()


def _video_of_one(frame: bytes) -> bytes:
    """Build an archive of one frame, which our server reads as a video."""
    file = io.BytesIO()
    name = "frame.jpg"
    if frame.startswith(b"\x89PNG"):
        name = "frame.png"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(name, frame)
    return file.getvalue()
