"""Requests of OpenAI's chat completions, checked strictly: what is not known or not supported is
refused by name."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from megatron_vita.errors import ConfigError
from megatron_vita.inference.requests import SamplingParams
from megatron_vita.inference.server.limits import Limits
from megatron_vita.inference.server.refusals import RefusalError, too_large

Number = StrictFloat | StrictInt
_SEED_BITS = 63
MAX_VALUES = 65_536
"""Values of a body: each takes time and memory, however short it is. 4,096 messages with an image each have fewer."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Strict):
    """Literal text."""

    type: Literal["text"]
    text: StrictStr


class ImageUrl(_Strict):
    """`detail` is accepted and changes nothing: the recipe decides how images are tiled."""

    url: StrictStr
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """The place of an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(_Strict):
    """Where a video is."""

    url: StrictStr


class VideoPart(_Strict):
    """The place of a video."""

    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """One turn. The fields that are always null come with answers that clients send back as they
    got them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[Part]
    name: StrictStr | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(_Strict):
    """Options of streams."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class ResponseFormat(_Strict):
    """Text is the only form of answers."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions. Null stands for a field's default, as at OpenAI.

    What comes from `top_k` to `max_frames` are extensions (`extra_body` of OpenAI's client).
    """

    model: StrictStr
    messages: list[Message] = Field(min_length=1)
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    seed: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    top_k: StrictInt | None = None
    repetition_penalty: Number | None = None
    num_beams: StrictInt | None = None
    length_penalty: Number | None = None
    ignore_eos: StrictBool | None = None
    max_frames: StrictInt | None = Field(None, ge=1)
    user: StrictStr | None = None
    response_format: ResponseFormat | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def parts(self) -> list[tuple[str, ImagePart | VideoPart]]:
        """The media in order, each with the name of its field."""
        return [
            (f"messages[{i}].content[{j}]", part)
            for i, message in enumerate(self.messages)
            if not isinstance(message.content, str)
            for j, part in enumerate(message.content)
            if not isinstance(part, TextPart)
        ]

    def prompt_messages(self) -> list[dict[str, Any]]:
        """Messages for `Prompt`. Texts are parts, so that `<image>` typed by a user stays text."""
        return [{"role": _role(m.role), "content": _content(m.content)} for m in self.messages]

    def text_characters(self) -> int:
        """Characters of all texts together."""
        return sum(
            len(part.get("text", "")) for m in self.prompt_messages() for part in m["content"]
        )


def parse_request(body: bytes, *, limits: Limits) -> ChatRequest:
    """The request in a JSON body. RefusalError names the first field that is wrong."""
    if _has_too_many_values(body):
        message = f"the body has more than {MAX_VALUES:,} values: fewer messages or parts of them are needed"
        raise RefusalError(message, code="too_many_values")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _first_fault(error) from error
    characters = request.text_characters()
    if characters > limits.text_characters:
        raise too_large(
            f"the messages have {characters:,} characters of text, at 8 to a token of the prompt too many",
            limit="prompt_tokens",
            most=limits.prompt_tokens,
            param="messages",
            status=400,
        )
    if len(request.parts()) > limits.media_files:
        raise too_large(
            f"the messages have {len(request.parts())} images and videos",
            limit="media_files",
            most=limits.media_files,
            param="messages",
            status=400,
        )
    return request


def _has_too_many_values(body: bytes) -> bool:
    """By what comes before values, counted outside of texts; those are looked for only where they
    may matter."""
    if _value_starts(body) <= MAX_VALUES:
        return False
    quotes = body.count(b'"') - body.count(b'\\"')
    return quotes > 4 * MAX_VALUES or _value_starts(_STRING.sub(b"", body)) > MAX_VALUES


def _value_starts(text: bytes) -> int:
    return sum(text.count(sign) for sign in (b",", b"[", b"{"))


def sampling_of(request: ChatRequest, *, limits: Limits, default_seed: int) -> SamplingParams:
    """How the answers are drawn; `default_seed` where the request has none. RefusalError for values
    out of range.

    The temperature is 1 by default, as at OpenAI, but 0 with beams, which need it.
    """
    num_beams = _or(request.num_beams, 1)
    _check_limits(request, limits)
    try:
        return SamplingParams(
            max_new_tokens=_or(
                request.max_completion_tokens, _or(request.max_tokens, limits.output_tokens)
            ),
            temperature=_or(request.temperature, 0.0 if num_beams > 1 else 1.0),
            top_k=_or(request.top_k, 0),
            top_p=_or(request.top_p, 1.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            seed=_or(request.seed, default_seed) % (1 << _SEED_BITS),  # OpenAI's may be negative
            n=_or(request.n, 1),
            logprobs=_or(request.top_logprobs, 0) if request.logprobs else None,
            num_beams=num_beams,
            length_penalty=_or(request.length_penalty, 1.0),
            ignore_eos=bool(request.ignore_eos),
        )
    except ConfigError as error:
        raise RefusalError(
            str(error), param=_request_field(str(error)), code="invalid_value"
        ) from error


def _check_limits(request: ChatRequest, limits: Limits) -> None:
    bounds = {
        "max_tokens": ("output_tokens", limits.output_tokens),
        "max_completion_tokens": ("output_tokens", limits.output_tokens),
        "n": ("choices", limits.choices),
        "num_beams": ("choices", limits.choices),
        "max_frames": ("video_frames", limits.video_frames),
    }
    for field, (limit, most) in bounds.items():
        value = getattr(request, field)
        if value is not None and value > most:
            raise too_large(
                f"{field} is {value:,}", limit=limit, most=most, param=field, status=400
            )
    if request.top_logprobs is not None and not request.logprobs:
        raise RefusalError(
            "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value"
        )


def _request_field(message: str) -> str:
    """The request's field that a message of SamplingParams, which begins with its own field's name, is
    about."""
    name = message.split(" ", 1)[0]
    return {"max_new_tokens": "max_tokens", "logprobs": "top_logprobs"}.get(name, name)


def _first_fault(error: ValidationError) -> RefusalError:
    """OpenAI's form of pydantic's first error. Inputs are not repeated: they may be long or
    secret."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return RefusalError(f"the body is not valid JSON: {fault['msg']}", code="invalid_json")
    field = "".join(
        f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"]
    ).lstrip(".")
    if fault["type"] == "extra_forbidden":
        return RefusalError(
            f"{field} is not a field that this server knows", param=field, code="unknown_parameter"
        )
    missing = fault["type"] == "missing"
    code = "missing_required_parameter" if missing else "invalid_value"
    return RefusalError(f"{field or 'the body'}: {fault['msg']}", param=field or None, code=code)


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _content(content: str | list[Part]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": part.type.removesuffix("_url")}
        for part in content
    ]


def _or[T](value: T | None, default: T) -> T:
    return default if value is None else value
