"""Request schema of OpenAI's chat completions. Unknown and unsupported fields are rejected by name."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.server.protocol import foreign_fields
from megatron_vita.inference.server.protocol.foreign_fields import ForeignFields, without_foreign

MUST_BE = "must_be"
"""The type of errors whose message says what a field must be."""


class _Object(BaseModel):
    """A JSON object, strictly typed; unsupported fields are accepted with neutral values only."""

    # Strict: a number sent as a string is a mistake of the client, and would be silently accepted.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    foreign: ClassVar[ForeignFields] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_foreign(cls, data: Any) -> Any:
        # Other types are left to pydantic, which has an error for them.
        if isinstance(data, dict):
            return without_foreign(data, cls.foreign)
        return data


class TextPart(_Object):
    """Literal text."""

    foreign = foreign_fields.PART_FIELDS
    type: Literal["text"]
    text: str


class ImageUrl(_Object):
    """URL of an image. `detail` has no effect: the recipe decides how images are tiled."""

    foreign = foreign_fields.IMAGE_URL_FIELDS
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Object):
    """An image inside a message."""

    foreign = foreign_fields.PART_FIELDS
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(_Object):
    """URL of a video."""

    foreign = foreign_fields.VIDEO_URL_FIELDS
    url: str


class VideoPart(_Object):
    """A video inside a message."""

    foreign = foreign_fields.PART_FIELDS
    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Object):
    """One turn of the conversation."""

    foreign = foreign_fields.MESSAGE_FIELDS
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        """Turn a plain string into a list of one text part."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise PydanticCustomError(MUST_BE, "a string or a list of parts")
        return content


class StreamOptions(_Object):
    """Options of a streamed response."""

    foreign = foreign_fields.STREAM_FIELDS
    include_usage: bool | None = None


class VideoIo(_Object):
    """vLLM's options for reading videos. `num_frames` limits the frames of each video; -1 means
    all."""

    foreign = foreign_fields.VIDEO_IO_FIELDS
    num_frames: int | None = None


class MediaIo(_Object):
    """vLLM's options for reading media."""

    foreign = foreign_fields.MEDIA_IO_FIELDS
    video: VideoIo | None = None


class ProcessorOptions(_Object):
    """vLLM's options of the model's processor: other names of `max_frames`."""

    foreign = foreign_fields.PROCESSOR_FIELDS
    num_frames: int | None = None
    max_frames: int | None = None


def _listed(stop: Any) -> Any:
    if isinstance(stop, str):
        return [stop]
    if not isinstance(stop, list):
        raise PydanticCustomError(MUST_BE, "a string or a list of strings")
    return stop


# OpenAI's fields for these have other names or types, and are defined in ChatRequest.
_SPECIAL = ("max_new_tokens", "stop", "logprobs")
SAMPLING_FIELDS = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.name not in _SPECIAL
)
"""Sampling parameters that are request fields of the same name and type."""


def _sampling_model() -> Any:
    types = get_type_hints(SamplingParams)
    fields: dict[str, Any] = {name: (types[name] | None, None) for name in SAMPLING_FIELDS}
    return create_model("SamplingFields", __base__=_Object, **fields)


_SamplingFields: Any = _sampling_model()


class ChatRequest(_SamplingFields):
    """The body of POST /v1/chat/completions. Null stands for a field's default, as at OpenAI.

    `use_beam_search`, `best_of`, `cache_salt` and the `kwargs` are vLLM's; `max_frames` is an
    extension (`extra_body` of OpenAI's client). The fields of SAMPLING_FIELDS are inherited.
    """

    foreign = foreign_fields.REQUEST_FIELDS
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(_listed)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    use_beam_search: bool | None = None
    best_of: int | None = None
    # An empty salt would look private and be shared with everybody.
    cache_salt: str | None = Field(None, min_length=1)
    media_io_kwargs: MediaIo | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    max_frames: int | None = None

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def frame_limits(self) -> Iterator[tuple[str, int]]:
        """Yield (field, frames) for each field that limits the frames of a video."""
        video = self.media_io_kwargs.video if self.media_io_kwargs else None
        processor = self.mm_processor_kwargs
        given = {
            "max_frames": self.max_frames,
            "media_io_kwargs.video.num_frames": video.num_frames if video else None,
            "mm_processor_kwargs.num_frames": processor.num_frames if processor else None,
            "mm_processor_kwargs.max_frames": processor.max_frames if processor else None,
        }
        for field, frames in given.items():
            # vLLM's clients send -1 for all frames.
            if frames is not None and not (frames == -1 and field.endswith("num_frames")):
                yield field, frames

    def parts(self) -> list[tuple[str, ImagePart | VideoPart]]:
        """Images and videos in order, each with the name of its field."""
        return [
            (f"messages[{i}].content[{j}]", part)
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message.content)
            if not isinstance(part, TextPart)
        ]

    def prompt_messages(self) -> list[dict[str, Any]]:
        """Messages for `Prompt`. Texts are parts, so that `<image>` typed by a user stays text."""
        return [
            {
                # OpenAI renamed the role; templates know the old name.
                "role": "system" if message.role == "developer" else message.role,
                "content": [_prompt_part(part) for part in message.content],
            }
            for message in self.messages
        ]

    def text_characters(self) -> int:
        """Number of characters of all texts."""
        return sum(
            len(part.text)
            for message in self.messages
            for part in message.content
            if isinstance(part, TextPart)
        )


def _prompt_part(part: Part) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": part.type.removesuffix("_url")}
