"""Conversion of a chat request to the engine's sampling parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_vita.config import GenerationConfig
from megatron_vita.errors import ConfigError
from megatron_vita.inference.requests.types import ADVISED, SamplingParams, advised
from megatron_vita.inference.server.protocol.api_errors import APIError, too_large
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.protocol import SAMPLING_FIELDS, ChatRequest

OPENAI_DEFAULTS = SamplingParams(temperature=1.0)
_SEED_BITS = 63


def defaults_of(generation: GenerationConfig) -> SamplingParams:
    """Default sampling parameters of a recipe; OpenAI's where it has none.

    Raises:
        ConfigError: a value is out of range.
    """
    return advised(OPENAI_DEFAULTS, generation, fields=ADVISED)


def sampling_of(
    request: ChatRequest,
    *,
    limits: Limits,
    default_seed: int,
    defaults: SamplingParams = OPENAI_DEFAULTS,
) -> SamplingParams:
    """Sampling parameters of a request.

    Args:
        default_seed: the seed if the request has none.
        defaults: values of all other fields that the request leaves out.

    Raises:
        APIError: a value is out of range, or two fields contradict each other.
    """
    _check_companions(request)
    _check_limits(request, limits)
    beams = _num_beams(request)
    given: dict[str, Any] = {name: getattr(request, name) for name in SAMPLING_FIELDS}
    given["max_new_tokens"] = _max_new_tokens(request, limits)
    given["num_beams"] = beams
    if request.top_k == -1:  # vLLM's way to say all tokens
        given["top_k"] = 0
    if request.stop is not None:
        given["stop"] = tuple(request.stop)
    if request.logprobs:
        given["logprobs"] = request.top_logprobs or 0
    if request.seed is None:
        given["seed"] = default_seed
    else:
        # OpenAI takes any integer, negative ones included
        given["seed"] = request.seed % (1 << _SEED_BITS)
    if beams is not None:
        given |= _beam_options(request)
    try:
        values = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(defaults, **values)
    except ConfigError as error:
        raise _in_the_requests_words(str(error), request) from error


def max_frames_of(request: ChatRequest, *, limits: Limits) -> int | None:
    """Limit of frames per video in a request; None stands for the recipe's.

    Raises:
        APIError: a number is out of range, or two fields differ.
    """
    given = dict(request.frame_limits())
    for field, frames in given.items():
        if frames < 1:
            _refuse(field, f"is {_shown(frames)}: it must be at least 1")
        if frames > limits.video_frames:
            _refuse_above(field, frames, limit="video_frames", most=limits.video_frames)
    # Equal numbers in several fields are harmless: clients send vLLM's names beside ours.
    if len(set(given.values())) > 1:
        first, second = list(given)[:2]
        _refuse(second, f"is {given[second]} and {first} is {given[first]}: one of them is enough")
    return next(iter(given.values()), None)


def _max_new_tokens(request: ChatRequest, limits: Limits) -> int:
    """Length limit of the outputs, capped by the server's; both of OpenAI's fields are checked."""
    for field in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, field)
        if value is not None and value < 1:
            _refuse(field, f"is {_shown(value)}: it must be at least 1")
    asked = request.max_tokens
    if request.max_completion_tokens is not None:
        asked = request.max_completion_tokens
    if asked is None:
        return limits.output_tokens
    return min(asked, limits.output_tokens)


def _num_beams(request: ChatRequest) -> int | None:
    """Width of a beam search; None if none is requested.

    In vLLM the width is `n`, and was `best_of`, which may exceed `n`, in its first versions.
    """
    if not request.use_beam_search:
        if request.num_beams != 1:
            return request.num_beams
        return None
    widths = {
        field: getattr(request, field)
        for field in ("num_beams", "best_of")
        if getattr(request, field) is not None
    }
    if len(set(widths.values())) > 1:
        _refuse(
            "num_beams",
            f"is {widths['num_beams']} and best_of is {widths['best_of']}: one of them is enough",
        )
    return next(iter(widths.values()), request.n if request.n is not None else 1)


def _beam_options(request: ChatRequest) -> Mapping[str, Any]:
    """Sampling options of a beam search, in which nothing is sampled. vLLM's clients send
    temperature 0 or 1, and both mean that beams are scored by the model's own probabilities."""
    if request.temperature not in (None, 0, 1):
        _refuse("temperature", f"is {request.temperature}: beam search draws nothing; 0 is right")
    neutral = {
        "top_k": (-1, 0),
        "top_p": (1,),
        "repetition_penalty": (1,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
    }
    for field, values in neutral.items():
        value = getattr(request, field)
        if value is not None and value not in values:
            _refuse(field, f"is {_shown(value)}: beam search takes none; leave it out")
    unused = {field: values[-1] for field, values in neutral.items()}
    return unused | {"temperature": 0.0}


def _check_companions(request: ChatRequest) -> None:
    """Reject fields that have a meaning only with another one, which is absent."""
    if request.top_logprobs and not request.logprobs:
        _refuse("top_logprobs", "needs logprobs to be true")
    if request.includes_usage and not request.stream:
        _refuse("stream_options", "needs stream to be true")
    is_beam_search = _num_beams(request) is not None
    if request.length_penalty not in (None, 1) and not is_beam_search:
        _refuse("length_penalty", "needs use_beam_search to be true")
    if request.best_of not in (None, 1, request.n) and not request.use_beam_search:
        _refuse("best_of", "needs use_beam_search to be true")


def _check_limits(request: ChatRequest, limits: Limits) -> None:
    for field in ("n", "num_beams", "best_of"):
        value = getattr(request, field)
        if value is not None and value > limits.choices:
            _refuse_above(field, value, limit="choices", most=limits.choices)


def _refuse(field: str, message: str) -> NoReturn:
    raise APIError(f"{field} {message}", param=field, code="invalid_value")


def _refuse_above(field: str, value: int, *, limit: str, most: int) -> NoReturn:
    message = f"{field} is {_shown(value)}"
    raise too_large(message, limit=limit, most=most, param=field, status=400)


def _shown(value: float) -> str:
    """Format a number of a request, which may have thousands of digits, for a message."""
    if abs(value) < 1e18:
        return f"{value:,}"
    return f"{value!s:.20}..."


def _in_the_requests_words(message: str, request: ChatRequest) -> APIError:
    """Convert an error of SamplingParams, whose message begins with its field, to one that names
    the request's field."""
    name, _, rest = message.partition(" ")
    width = next((f for f in ("num_beams", "best_of") if getattr(request, f) is not None), "n")
    field = {"logprobs": "top_logprobs", "num_beams": width}.get(name, name)
    return APIError(f"{field} {rest}", param=field, code="invalid_value")
