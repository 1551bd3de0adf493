"""Parsing of a request body, with errors that name the field as the body does."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from megatron_vita.inference.server.protocol import foreign_fields
from megatron_vita.inference.server.protocol.api_errors import APIError, too_large
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.protocol import MUST_BE, ChatRequest

MAX_VALUES = 65_536
"""Values of a body: each takes time and memory, however short it is. 4,096 messages with an image each have fewer."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_LONGEST_NAME = 200

_TYPES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""Expected values in error messages, by the type of pydantic's error."""


def parse_request(body: bytes, *, limits: Limits) -> ChatRequest:
    """Parse a JSON body.

    Raises:
        APIError: names the first field that is wrong.
    """
    if _has_too_many_values(body):
        message = f"the body has more than {MAX_VALUES:,} values: fewer messages or parts of them are needed"
        raise APIError(message, code="too_many_values")
    try:
        # JSON has no NaN and infinity, though many parsers take them.
        request = ChatRequest.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        raise _first_fault(error) from error
    except ValueError as error:
        raise APIError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    _check_size(request, limits)
    return request


def _check_size(request: ChatRequest, limits: Limits) -> None:
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


def _has_too_many_values(body: bytes) -> bool:
    """Count JSON values by the characters that precede them, outside of strings. Strings are
    removed only if the count without that is too high."""
    if _value_starts(body) <= MAX_VALUES:
        return False
    # Removing strings is slow, and pointless if quotes alone show that there are too many values.
    quotes = body.count(b'"') - body.count(b'\\"')
    return quotes > 4 * MAX_VALUES or _value_starts(_STRING.sub(b"", body)) > MAX_VALUES


def _value_starts(text: bytes) -> int:
    return sum(text.count(sign) for sign in (b",", b"[", b"{"))


def _first_fault(error: ValidationError) -> APIError:
    """Convert pydantic's first error to OpenAI's format. Values are not repeated: they may be long
    or secret."""
    fault = error.errors(include_url=False)[0]
    context = fault.get("ctx", {})
    field = _field_name(fault["loc"])
    match fault["type"]:
        case "missing":
            return _refusal(field, "is missing", code="missing_required_parameter")
        case "extra_forbidden":
            message = "is not a field that this server knows"
            return _refusal(field, message, code="unknown_parameter")
        case foreign_fields.REFUSED:
            name = f"{field}.{context['field']}".lstrip(".")
            message = f"is not supported: {context['reason']}"
            return _refusal(name, message, code="unsupported_parameter")
        case "union_tag_not_found":
            return _refusal(f"{field}.type", "is missing", code="missing_required_parameter")
        case "union_tag_invalid":
            return _wrong_part(f"{field}.type", str(context["tag"]))
    return _refusal(field, _wrong_value(fault), code="invalid_value")


def _refusal(field: str, message: str, *, code: str) -> APIError:
    return APIError(f"{field or 'the body'} {message}", param=field or None, code=code)


def _wrong_part(field: str, kind: str) -> APIError:
    known = "known are text, image_url and video_url"
    message = f"is {kind!r:.{_LONGEST_NAME}}: {foreign_fields.PART_TYPES.get(kind, 'there is no such part')}; {known}"
    return _refusal(field, message, code="invalid_value")


def _wrong_value(fault: ErrorDetails) -> str:
    """Describe the expected type and the actual one."""
    kind = fault["type"]
    context = fault.get("ctx", {})
    value = fault["input"]
    # An integer of thousands of digits does not fit a float.
    if kind == "float_type" and isinstance(value, int) and not isinstance(value, bool):
        return "is too large a number"
    if kind == MUST_BE or kind in _TYPES:
        return f"must be {_TYPES.get(kind, fault['msg'])}, not {_json_type(value)}"
    if kind == "literal_error":
        return f"must be one of {context['expected']}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    return f"is wrong: {fault['msg']}"


def _json_type(value: Any) -> str:
    names: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _field_name(location: Sequence[int | str]) -> str:
    """Format a location in the body as `messages[0].content[1].image_url.url`."""
    steps = list(location)
    if len(steps) > 4 and steps[:3:2] == ["messages", "content"]:
        del steps[4]  # the type of the part, which pydantic counts as a step
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return name.lstrip(".")[:_LONGEST_NAME]
