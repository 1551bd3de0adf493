"""Fields that other clients send: neutral values have no effect, and refused ones are named."""

import json
from pathlib import Path
from typing import Any, get_type_hints

import openai.types.chat as openai_types
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.server.protocol import foreign_fields, protocol
from megatron_vita.inference.server.protocol.api_errors import APIError
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.parsing import parse_request
from megatron_vita.inference.server.protocol.sampling import max_frames_of, sampling_of
from tests.inference.server.vllm_fields import ASKS_FOR_MORE, SGLANG, VLLM

LIMITS = Limits()
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"
URL = "data:image/png;base64,AAAA"
USER = {"role": "user", "content": "hello"}
PLAIN = SamplingParams(temperature=1.0, max_new_tokens=LIMITS.output_tokens, seed=7)


def sampling(**fields: Any) -> SamplingParams:
    request = parse(**fields)
    max_frames_of(request, limits=LIMITS)
    return sampling_of(request, limits=LIMITS, default_seed=7)


def parse(**fields: Any) -> protocol.ChatRequest:
    body = {"model": "toy", "messages": [USER], **fields}
    return parse_request(json.dumps(body).encode(), limits=LIMITS)


def refused(**fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        sampling(**fields)
    assert caught.value.status == 400
    return caught.value


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


OPENAIS = sorted(set(get_type_hints(CompletionCreateParamsBase)) - {"model", "messages"})


@pytest.mark.parametrize("field", OPENAIS)
def test_null_in_any_field_of_openai_changes_nothing(field: str) -> None:
    assert sampling(**{field: None}) == PLAIN


@pytest.mark.parametrize("field", sorted(foreign_fields.REQUEST_FIELDS))
@pytest.mark.parametrize("empty", [None, [], {}])
def test_empty_values_of_foreign_fields_change_nothing(field: str, empty: Any) -> None:
    assert sampling(**{field: empty}) == PLAIN


@pytest.mark.parametrize("field", sorted(VLLM))
def test_vllms_defaults_change_nothing(field: str) -> None:
    assert sampling(**{field: VLLM[field]}) == sampling(**{field: None}) == PLAIN


@pytest.mark.parametrize("field", sorted(SGLANG))
def test_sglangs_defaults_change_nothing(field: str) -> None:
    assert sampling(**{field: SGLANG[field]}) == sampling(**{field: None}) == PLAIN


def test_all_defaults_at_once_change_nothing() -> None:
    assert sampling(**(VLLM | SGLANG)) == PLAIN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "none"), ("tool_choice", "auto"), ("function_call", "none"),
        ("parallel_tool_calls", False), ("modalities", ["text"]), ("verbosity", "medium"),
        ("response_format", {"type": "text"}), ("reasoning_effort", "none"), ("store", True),
        ("store", False), ("metadata", {"run": "5"}), ("user", "ann"), ("service_tier", "flex"),
        ("prompt_cache_key", "x"), ("safety_identifier", "x"), ("stream_options", {}),
        ("prediction", {"type": "content", "content": "x"}), ("watermarking", False),
    ],
)  # fmt: skip
def test_openais_defaults_and_hints_change_nothing(field: str, value: Any) -> None:
    assert sampling(**{field: value}) == PLAIN


@pytest.mark.parametrize("field", sorted(ASKS_FOR_MORE))
def test_what_a_foreign_field_asks_for_is_refused_by_name(field: str) -> None:
    error = refused(**{field: ASKS_FOR_MORE[field]})
    assert error.param == field
    assert str(error).startswith(f"{field} ")


@pytest.mark.parametrize(("field", "value"), [("priority", False), ("skip_special_tokens", 1)])
def test_true_and_false_are_no_numbers(field: str, value: Any) -> None:
    assert refused(**{field: value}).code == "unsupported_parameter"


@pytest.mark.parametrize("field", ["colour", "temprature", "Tools"])
def test_fields_of_nobody_are_refused_also_when_they_are_null(field: str) -> None:
    assert refused(**{field: None}).code == "unknown_parameter"


ROLES = ["user", "assistant", "system", "developer"]


@pytest.mark.parametrize("role", ROLES)
def test_every_field_of_openais_messages_is_known(role: str) -> None:
    hints = get_type_hints(getattr(openai_types, f"ChatCompletion{role.capitalize()}MessageParam"))
    message = {"role": role, "content": "x"} | dict.fromkeys(hints.keys() - {"role", "content"})
    assert parse(messages=[message]).messages[0].role == role


def test_answers_of_other_servers_can_be_sent_back() -> None:
    answers: list[dict[str, Any]] = [
        {"refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"tool_calls": [], "reasoning": None},
        {"tool_calls": [], "reasoning_content": "", "parsed": None},
        {"provider_specific_fields": {"refusal": None}, "annotations": [{"type": "url_citation"}]},
    ]
    for answer in answers:
        parse(messages=[USER, {"role": "assistant", "content": "x"} | answer, USER])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [{"id": "1"}]), ("reasoning", "hm"), ("audio", {"id": "x"}),
        ("refusal", "no"), ("tool_call_id", "1"), ("function_call", {"name": "f"}),
    ],
)  # fmt: skip
def test_what_a_message_cannot_bring_is_refused_by_name(field: str, value: Any) -> None:
    error = refused(messages=[USER, {"role": "assistant", "content": "x", field: value}])
    assert error.param == f"messages[1].{field}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"type": "image_url", "image_url": {"url": URL, "detail": "original"}},
        {"type": "image_url", "image_url": {"url": URL, "detail": None}, "uuid": "x"},
        {"type": "image_url", "image_url": {"url": URL, "max_dynamic_patch": None}},
        {"type": "video_url", "video_url": {"url": URL}, "uuid": None, "cache_control": None},
    ],
)
def test_hints_in_parts_change_nothing(part: dict[str, Any]) -> None:
    parse(messages=asked(part))


WRONG_PARTS: list[tuple[Any, str, str]] = [
    ({"type": "image_url", "image_url": URL}, "image_url", "must be an object, not a string"),
    ({"type": "image_url", "image_url": {}}, "image_url.url", "is missing"),
    ({"type": "image_url"}, "image_url", "is missing"),
    ({"type": "image_url", "image_url": {"url": 5}}, "image_url.url", "must be a string"),
    ({"type": "video_url", "video_url": {"url": None}}, "video_url.url", "must be a string"),
    ({"type": "video_url", "video_url": {"url": "", "fps": 2}}, "video_url.fps", "not a field"),
    ({"type": "image_url", "image_url": {"url": "", "detail": 1}}, "image_url.detail", "one of"),
    ({"type": "text", "text": None}, "text", "must be a string, not null"),
    ({"type": "text"}, "text", "is missing"),
    ({"type": "text", "text": "x", "annotations": [1]}, "annotations", "not supported"),
    ({"type": "input_audio", "input_audio": {"data": ""}}, "type", "neither hears nor speaks"),
    ({"type": "image", "image": "a.png"}, "type", "image_url"),
    ({"type": "input_text", "text": "x"}, "type", "text"),
    ({"type": "hologram"}, "type", "no such part"),
    ({"type": []}, "type", "no such part"),
    ({"text": "x"}, "type", "is missing"),
    ("hello", "", "must be an object, not a string"),
    (None, "", "must be an object, not null"),
]


@pytest.mark.parametrize(("part", "field", "reason"), WRONG_PARTS, ids=str)
def test_a_wrong_part_is_named_by_the_field_that_it_has(part: Any, field: str, reason: str) -> None:
    name = f"messages[0].content[1].{field}".rstrip(".")
    error = refused(messages=asked({"type": "text", "text": "look"}, part))
    assert error.param == name
    assert str(error).startswith(f"{name} ")
    assert reason in str(error)


WRONG_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"stop": [None]}, "stop[0]", "must be a string, not null"),
    ({"stop": 5}, "stop", "must be a string or a list of strings, not a number"),
    ({"temperature": "0.5"}, "temperature", "must be a number, not a string"),
    ({"temperature": 10**400}, "temperature", "too large"),
    ({"seed": 1.5}, "seed", "must be a whole number"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "list of parts"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "one of 'system'"),
    ({"messages": ["hello"]}, "messages[0]", "must be an object, not a string"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "is 0: it must be at least 1"),
    ({"max_tokens": -1}, "max_tokens", "is -1: it must be at least 1"),
    ({"max_tokens": 0, "max_completion_tokens": 5}, "max_tokens", "must be at least 1"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "is 21: it must be from 0 to 20"),
    ({"use_beam_search": True, "n": 9}, "n", "--choices"),
    ({"use_beam_search": True, "best_of": 2, "n": 3}, "best_of", "n of at most as many"),
    ({"n": 10**4000}, "n", "--choices"),
    ({"cache_salt": ""}, "cache_salt", "must not be empty"),
]


@pytest.mark.parametrize(
    ("fields", "name", "reason"), WRONG_FIELDS, ids=lambda each: str(each)[:40]
)
def test_a_wrong_value_is_named_by_the_field_that_the_request_has(
    fields: dict[str, Any], name: str, reason: str
) -> None:
    error = refused(**fields)
    assert error.param == name
    assert str(error).startswith(f"{name} ")
    assert reason in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"max_tokens": 4097}, 4096), ({"max_tokens": 10**30}, 4096), ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 16_384}, 4096), ({"max_tokens": None}, 4096),
        ({"max_tokens": 9, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, 9),
    ],
)  # fmt: skip
def test_answers_are_as_long_as_asked_but_no_longer_than_the_limit(
    fields: dict[str, Any], longest: int
) -> None:
    assert sampling(**fields).max_new_tokens == longest


@pytest.mark.parametrize(
    ("fields", "beams", "answers"),
    [
        ({"use_beam_search": True, "n": 3}, 3, 3),
        ({"use_beam_search": True, "n": 3, "temperature": 0}, 3, 3),
        ({"use_beam_search": True, "n": 3, "temperature": 1, "top_p": 1, "top_k": -1}, 3, 3),
        ({"use_beam_search": True, "best_of": 4, "n": 2}, 4, 2),
        ({"use_beam_search": True, "num_beams": 4}, 4, 1),
        ({"use_beam_search": True}, 1, 1),
        ({"num_beams": 4, "n": 2}, 4, 2),
        ({"use_beam_search": False, "n": 2}, 1, 2),
        ({"best_of": 2, "n": 2}, 1, 2),
    ],
)  # fmt: skip
def test_beam_search_is_asked_for_as_in_vllm(
    fields: dict[str, Any], beams: int, answers: int
) -> None:
    found = sampling(**fields)
    assert (found.num_beams, found.n) == (beams, answers)
    assert found.temperature == (0 if {"use_beam_search", "num_beams"} & fields.keys() else 1) or (
        fields.get("use_beam_search") is False
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"length_penalty": 2}, "length_penalty"),
        ({"best_of": 3}, "best_of"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"use_beam_search": True, "n": 2, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "n": 2, "frequency_penalty": 1}, "frequency_penalty"),
        ({"use_beam_search": True, "best_of": 2, "num_beams": 3}, "num_beams"),
    ],
)
def test_what_could_have_no_effect_is_refused(fields: dict[str, Any], name: str) -> None:
    assert refused(**fields).param == name


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({"max_frames": 8}, 8),
        ({"media_io_kwargs": {"video": {"num_frames": 8}}}, 8),
        ({"media_io_kwargs": {"video": {"num_frames": -1, "fps": -1}}}, None),
        ({"media_io_kwargs": {"image": {}, "video": {}}}, None),
        ({"mm_processor_kwargs": {"num_frames": 8}}, 8),
        ({"mm_processor_kwargs": {"max_frames": 8}, "max_frames": 8}, 8),
        ({"mm_processor_kwargs": {}}, None),
    ],
)
def test_frames_are_limited_by_vllms_names_too(fields: dict[str, Any], frames: int | None) -> None:
    assert max_frames_of(parse(**fields), limits=LIMITS) == frames


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"mm_processor_kwargs": {"max_frames": 8}, "max_frames": 9}, "mm_processor_kwargs.max_frames"),
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video.num_frames"),
        ({"media_io_kwargs": {"video": {"num_frames": 9999}}}, "media_io_kwargs.video.num_frames"),
        ({"media_io_kwargs": {"video": {"fps": 2}}}, "media_io_kwargs.video.fps"),
        ({"media_io_kwargs": {"audio": {"rate": 2}}}, "media_io_kwargs.audio"),
        ({"mm_processor_kwargs": {"max_pixels": 2}}, "mm_processor_kwargs.max_pixels"),
    ],
)  # fmt: skip
def test_other_options_of_media_are_refused_by_name(fields: dict[str, Any], name: str) -> None:
    assert refused(**fields).param == name


def test_defaults_of_the_server_hold_for_what_a_request_leaves_open() -> None:
    defaults = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    found = sampling_of(parse(top_k=5), limits=LIMITS, default_seed=1, defaults=defaults)
    assert (found.temperature, found.top_p, found.top_k) == (0.7, 0.8, 5)
    assert found.repetition_penalty == 1.05
    beams = sampling_of(parse(num_beams=2), limits=LIMITS, default_seed=1, defaults=defaults)
    assert (beams.temperature, beams.repetition_penalty, beams.num_beams) == (0, 1, 2)


def test_the_documentation_lists_foreign_fields_from_their_table() -> None:
    assert foreign_fields.as_markdown() in DOCS.read_text(encoding="utf-8")
