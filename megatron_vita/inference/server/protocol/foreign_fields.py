"""Fields of OpenAI's, vLLM's and SGLang's chat completions that this server does not implement.

Clients send many of them with values that request nothing: null, an empty list or object, or the
documented default. These are accepted without effect. Any other value is rejected with the reason,
except for fields that are ignored whatever they hold. docs/serving.md has the lists, made from this
table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

REFUSED = "foreign_field"
"""The type of the error that refuses a foreign field; its context names `field` and `reason`."""


@dataclass(frozen=True, kw_only=True)
class ForeignField:
    """A field that is ignored, or rejected unless its value is neutral; `why` is the reason."""

    why: str
    ignored: bool = False
    neutral: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Tell whether a value has no effect."""
        # These request nothing, whatever the field.
        return self.ignored or value in (None, [], {}) or _is_one_of(value, self.neutral)

    @property
    def accepted(self) -> str:
        """The accepted values in JSON, for an error message."""
        return ", ".join(["null", "[]", "{}", *map(_as_json, self.neutral)])


ForeignFields = Mapping[str, ForeignField]


def without_foreign(data: dict[str, Any], table: ForeignFields) -> dict[str, Any]:
    """Remove unsupported fields without effect from a JSON object.

    Raises:
        PydanticCustomError: a field requests something that this server does not do.
    """
    for name in data.keys() & table.keys():
        field = table[name]
        if not field.accepts(data[name]):
            reason = f"{field.why} (accepted: {field.accepted})"
            raise PydanticCustomError(REFUSED, "{reason}", {"field": name, "reason": reason})
    return {name: value for name, value in data.items() if name not in table}


def _is_one_of(value: Any, neutral: Iterable[Any]) -> bool:
    """Compare values as JSON does, where true is not 1."""
    # In Python True equals 1.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _as_json(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("'", '"')


def _refused(why: str, **fields: tuple[Any, ...]) -> dict[str, ForeignField]:
    """Fields with their neutral values, rejected for one common reason."""
    return {name: ForeignField(why=why, neutral=neutral) for name, neutral in fields.items()}


def _ignored(why: str, *names: str) -> dict[str, ForeignField]:
    return dict.fromkeys(names, ForeignField(why=why, ignored=True))


_TOOLS = "the model calls no tools"
_AUDIO = "the model neither hears nor speaks"
_FORMATS = "answers are free text"
_REASONING = "answers have no reasoning apart from their text"
_SAMPLING = "answers are not drawn so here"
_RETURNED = "answers do not come with it"
_TEMPLATE = "the checkpoint's template decides what a prompt looks like"
_PIXELS = "the recipe decides how images and frames are prepared"
_ROUTING = "this server is one engine with one model"
_CACHING = "a hint about caching: known beginnings of prompts are always looked for"
_BOOKKEEPING = "nothing is kept about requests"
_IDENTITY = "the answer has an id of its own"

REQUEST_FIELDS: ForeignFields = {
    **_ignored(_BOOKKEEPING, "user", "safety_identifier", "metadata", "store", "custom_labels"),
    **_ignored("all requests are served alike", "service_tier"),
    **_ignored(_IDENTITY, "request_id", "rid", "session_id"),
    **_ignored(_CACHING, "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    **_ignored("a hint that would only quicken an answer", "prediction", "stream_interval"),
    **_refused(
        _TOOLS,
        tools=(),
        tool_choice=("none", "auto"),
        parallel_tool_calls=(True, False),
        functions=(),
        function_call=("none", "auto"),
        web_search_options=(),
    ),
    **_refused(_AUDIO, audio=(), modalities=(["text"],), use_audio_in_video=(False,)),
    **_refused(
        _FORMATS,
        response_format=({"type": "text"},),
        structured_outputs=(),
        guided_json=(),
        guided_regex=(),
        guided_choice=(),
        guided_grammar=(),
        guided_decoding_backend=(),
        guided_whitespace_pattern=(),
        structural_tag=(),
        json_schema=(),
        regex=(),
        ebnf=(),
        verbosity=("medium",),
    ),
    **_refused(
        _REASONING,
        reasoning=(),
        reasoning_effort=("none", "medium"),
        include_reasoning=(True, False),
        separate_reasoning=(True, False),
        stream_reasoning=(True, False),
        thinking_token_budget=(),
    ),
    **_refused("answers are not checked", moderation=()),
    **_refused(
        _SAMPLING,
        logit_bias=(),
        min_p=(0,),
        min_tokens=(0,),
        stop_token_ids=(),
        stop_regex=(),
        bad_words=(),
        allowed_token_ids=(),
        logits_processors=(),
        custom_logit_processor=(),
        custom_params=(),
        repetition_detection=(),
        watermarking=(False,),
        early_stopping=(False,),
        include_stop_str_in_output=(False,),
        no_stop_trim=(False,),
        skip_special_tokens=(True,),
        spaces_between_special_tokens=(True, False),
    ),
    **_refused(
        _RETURNED,
        echo=(False,),
        prompt_logprobs=(),
        logprob_token_ids=(),
        return_tokens_as_token_ids=(False,),
        return_token_ids=(False,),
        return_token_offsets=(False,),
        return_prompt_text=(False,),
        return_prompt_token_ids=(False,),
        return_hidden_states=(False,),
        return_routed_experts=(False,),
        return_cached_tokens_details=(False,),
        return_meta_info=(False,),
        return_mm_kwargs=(True, False),
        routed_experts_prompt_start=(0,),
        routed_experts_start_len=(0,),
    ),
    **_refused(
        _TEMPLATE,
        add_generation_prompt=(True,),
        continue_final_message=(False,),
        add_special_tokens=(False,),
        chat_template=(),
        chat_template_kwargs=(),
        documents=(),
        input_ids=(),
        task=(),
        truncate_prompt_tokens=(),
        truncation_side=(),
    ),
    **_refused(_PIXELS, max_dynamic_patch=(), min_dynamic_patch=(), images_config=()),
    **_refused(
        _ROUTING,
        priority=(0,),
        lora_path=(),
        session_params=(),
        extra_key=(),
        ngram_corpus_id=(),
        kv_transfer_params=(),
        ec_transfer_params=(),
        vllm_xargs=(),
        bootstrap_host=(),
        bootstrap_port=(),
        bootstrap_room=(),
        routed_dp_rank=(),
        data_parallel_rank=(),
        disagg_prefill_dp_rank=(),
    ),
}

STREAM_FIELDS: ForeignFields = {
    **_ignored("no padding is sent", "include_obfuscation"),
    **_refused("usage comes once, in the last chunk", continuous_usage_stats=(False,)),
}

MESSAGE_FIELDS: ForeignFields = {
    **_ignored("prompts name roles alone", "name"),
    **_ignored(
        "facts about an answer, which are no part of a prompt",
        "annotations",
        "provider_specific_fields",
    ),
    **_refused("an answer that was refused has no text to go on from", refusal=()),
    **_refused(_AUDIO, audio=()),
    **_refused(_TOOLS, tools=(), tool_calls=(), tool_call_id=(), function_call=()),
    **_refused(_REASONING, reasoning=("",), reasoning_content=("",), thinking_blocks=()),
    **_refused(_FORMATS, parsed=()),
    **_refused(_TEMPLATE, task=(), prefix=(False,)),
}

PART_FIELDS: ForeignFields = {
    **_ignored(_CACHING, "cache_control", "prompt_cache_breakpoint", "uuid"),
    **_refused("a text has no notes here", annotations=()),
    **_refused(_PIXELS, modalities=("image", "video")),
}

IMAGE_URL_FIELDS: ForeignFields = {
    **_ignored(_CACHING, "content_hash"),
    **_refused(_PIXELS, max_dynamic_patch=(), min_dynamic_patch=()),
}

VIDEO_URL_FIELDS: ForeignFields = {
    **_refused(_PIXELS, max_dynamic_patch=(), min_dynamic_patch=()),
}

MEDIA_IO_FIELDS: ForeignFields = {
    **_refused(_PIXELS, image=({"image_mode": "RGB"},)),
    **_refused(_AUDIO, audio=()),
}

VIDEO_IO_FIELDS: ForeignFields = {
    **_refused("the recipe's media.max_fps decides how densely frames are taken", fps=(-1,)),
}

PROCESSOR_FIELDS: ForeignFields = {
    **_refused("the recipe's media.max_fps decides how densely frames are taken", fps=(-1,)),
    **_refused(
        _PIXELS,
        min_pixels=(),
        max_pixels=(),
        size=(),
        min_dynamic_patch=(),
        max_dynamic_patch=(),
        dynamic_image_size=(),
        do_sample_frames=(True,),
        use_audio_in_video=(False,),
    ),
}

PART_TYPES: Mapping[str, str] = {
    "input_audio": _AUDIO,
    "audio_url": _AUDIO,
    "file": "files other than images and videos are not read",
    "refusal": "an answer that was refused has no text to go on from",
    "thinking": _REASONING,
    "reasoning": _REASONING,
    "tool_reference": _TOOLS,
    "image": "an image is a part image_url",
    "image_pil": "an image is a part image_url",
    "input_image": "an image is a part image_url",
    "image_embeds": "an image is a part image_url",
    "video": "a video is a part video_url",
    "input_video": "a video is a part video_url",
    "input_text": "a text is a part text",
    "output_text": "a text is a part text",
    "prompt_embeds": "a text is a part text",
    "audio_embeds": _AUDIO,
}
"""Why parts of other types are refused."""

PLACES: Mapping[str, ForeignFields] = {
    "the request": REQUEST_FIELDS,
    "`stream_options`": STREAM_FIELDS,
    "a message": MESSAGE_FIELDS,
    "a part of a message": PART_FIELDS,
    "`image_url`": IMAGE_URL_FIELDS,
    "`video_url`": VIDEO_URL_FIELDS,
    "`media_io_kwargs`": MEDIA_IO_FIELDS,
    "`media_io_kwargs.video`": VIDEO_IO_FIELDS,
    "`mm_processor_kwargs`": PROCESSOR_FIELDS,
}
"""The tables by the object whose fields they name."""


def as_markdown() -> str:
    """Tables for docs/serving.md: ignored fields, and fields rejected unless neutral."""
    lines = ["| fields | in | |", "|---|---|---|"]
    for place, table in PLACES.items():
        for ignored in (True, False):
            for why in dict.fromkeys(f.why for f in table.values() if f.ignored == ignored):
                fields = {n: f for n, f in table.items() if (f.why, f.ignored) == (why, ignored)}
                names = ", ".join(_with_neutral(name, field) for name, field in fields.items())
                lines.append(
                    f"| {names} | {place} | {'ignored' if ignored else 'refused'}: {why} |"
                )
    return "\n".join(lines) + "\n"


def _with_neutral(name: str, field: ForeignField) -> str:
    values = ", ".join(map(_as_json, field.neutral))
    return f"`{name}`" + (f" ({values})" if values else "")
