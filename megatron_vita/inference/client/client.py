"""Client of the OpenAI chat completions protocol, for our server or any other."""

import dataclasses
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import httpx2
import openai

from megatron_vita.errors import RefusedError, ServerError
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.media.data_urls import data_url
from megatron_vita.text.conversation import TextPart, check_messages

KEY_VARIABLES = ("VITA_API_KEY", "OPENAI_API_KEY")
# a prompt of a million tokens may be read for minutes
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 3600
_OF_THE_PROMPT = (400, 413, 422)
_STANDARD = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", "seed", "n")
_RENAMED = ("max_new_tokens", "logprobs")  # OpenAI's fields have other names or types


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A token of an answer with its log-probability, and the likeliest alternatives."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """New text of one answer, whose index is `choice`."""

    choice: int = 0
    text: str = ""
    tokens: tuple[TokenText, ...] = ()  # where log-probabilities were asked for


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer; `prompt_tokens` is None if the server does not report it."""

    text: str
    prompt_tokens: int | None


class ChatServer:
    """A server at `base_url` (such as http://localhost:8000/v1), with the key in the environment
    (KEY_VARIABLES)."""

    def __init__(self, base_url: str, *, model: str | None = None) -> None:
        """`model`: None takes the first that the server lists. Sends nothing yet."""
        if not base_url.startswith(("http://", "https://")):
            raise ServerError(
                f"the server's URL is {base_url!r}: it must start with http:// or https://"
            )
        self.base_url = base_url
        self._model = model
        self._client = openai.OpenAI(
            base_url=base_url,
            # Servers without keys ignore it, but OpenAI's client wants one.
            api_key=next(filter(None, map(os.environ.get, KEY_VARIABLES)), "none"),
            timeout=openai.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        )

    @cached_property
    def model(self) -> str:
        """Name of the model.

        Raises:
            ServerError: the server lists none.
        """
        if self._model is not None:
            return self._model
        with self._errors():
            for model in self._client.models.list():
                return model.id
        raise ServerError(f"{self.base_url} lists no model: name one")

    def complete(self, prompt: Prompt, *, sampling: SamplingParams) -> Completion:
        """Get the first answer.

        Raises:
            RefusedError: the server rejected the request.
            ServerError: anything else failed.
        """
        with self._errors():
            response = self._client.chat.completions.create(**self._request(prompt, sampling))
        usage = response.usage
        return Completion(
            text=response.choices[0].message.content or "",
            prompt_tokens=usage.prompt_tokens if usage is not None else None,
        )

    def stream(
        self, prompt: Prompt, *, sampling: SamplingParams, unset: Collection[str] = ()
    ) -> Iterator[TextDelta]:
        """Stream answers. Closing the iterator cancels the request, and the server's work on it.

        unset: fields of `sampling` that are not sent, so that the server's defaults hold.
        """
        request = self._request(prompt, sampling)
        for name in unset:
            request.pop(name, None)
        with self._errors(), self._client.chat.completions.create(**request, stream=True) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    scored = choice.logprobs.content if choice.logprobs else None
                    yield TextDelta(
                        choice=choice.index,
                        text=choice.delta.content or "",
                        tokens=tuple(map(_token_text, scored or ())),
                    )

    def _request(self, prompt: Prompt, sampling: SamplingParams) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": openai_messages(prompt),
            **openai_options(sampling),
        }

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            message = f"{self.base_url} answers {error.status_code}: {_reason(error)}"
            if error.status_code in _OF_THE_PROMPT:
                raise RefusedError(message) from error
            raise ServerError(message) from error
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise ServerError(f"{self.base_url}: {error.__cause__ or error}") from error


def openai_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages of a prompt with its media as data URLs in their places.

    Raises:
        DataError: the prompt is invalid.
    """
    sample = {
        "messages": prompt.messages,
        "images": list(prompt.images),
        "videos": list(prompt.videos),
    }
    files = {"image": iter(prompt.images), "video": iter(prompt.videos)}
    messages = []
    for turn in check_messages(sample, needs_answer=False):
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, TextPart):
                text = part.text
                if parts and parts[-1]["type"] != "text":
                    # servers put a line break between a medium and a text by themselves
                    text = text.removeprefix("\n")
                parts.append({"type": "text", "text": text})
            else:
                parts.append(_media_part(part.kind, next(files[part.kind])))
        messages.append({"role": turn.role, "content": _content(parts)})
    return messages


def _media_part(kind: str, file: MediaFile) -> dict[str, Any]:
    medium: Literal["image", "video"] = "video" if kind == "video" else "image"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": data_url(file.data, medium)}}


def _content(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    # text alone is sent as a string: some servers take no lists
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def openai_options(sampling: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as fields of the protocol; what it does not name is sent by our names
    where it differs from its default."""
    options: dict[str, Any] = {name: getattr(sampling, name) for name in _STANDARD}
    options |= {"max_tokens": sampling.max_new_tokens, "stop": list(sampling.stop) or openai.omit}
    if sampling.logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    defaults = SamplingParams()
    # Other servers may not know the rest, so that it is sent only where it is asked for.
    extra = {
        field.name: getattr(sampling, field.name)
        for field in dataclasses.fields(sampling)
        if field.name not in (*_STANDARD, *_RENAMED)
        and getattr(sampling, field.name) != getattr(defaults, field.name)
    }
    if extra:
        options["extra_body"] = extra
    return options


def _token_text(token: Any) -> TokenText:
    likeliest = tuple((other.token, other.logprob) for other in token.top_logprobs or ())
    return TokenText(text=token.token, logprob=token.logprob, likeliest=likeliest)


def _reason(error: openai.APIStatusError) -> str:
    """Message in an error's body, or the beginning of the body."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.response.text)[:500]
