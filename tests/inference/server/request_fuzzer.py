"""Random requests: made from OpenAI's own schema, and from facts about vLLM's and SGLang's."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from tests.inference.server.media_makers import data_url, png
from tests.inference.server.running_server import MODEL
from tests.inference.server.vllm_fields import ASKS_FOR_MORE, SGLANG, VLLM
from tests.inference.server.webm import webm

Json = Any

SHORT = (
    "hello", "", " ", "is there a red circle", "<image>", "<|im_end|>", "<IMG_CONTEXT>", "</s>",
    "\u0000", "\u202e", "🙂 é ü 日本", "a\n\tb", "none", "auto", "null", "{}",
)  # fmt: skip
TEXTS = (*SHORT, "word " * 4000)
URLS = (
    "data:image/png;base64,AAAA", "data:,", "file:///etc/passwd", "../../etc/passwd",
    "http://169.254.169.254/latest", "https://example.invalid/x.png", "", "x" * 3000, "ftp://a/b",
)  # fmt: skip
INTEGERS = (0, 1, 2, 3, 5, 8, 20, 21, -1, -2, 100, 4097, 2**31, 2**63, -(2**63), 10**30)
NUMBERS = (0, 0.0, 0.5, 1, 1.0, 1.5, 2, -1, -2.0, 0.1, 1e-9, 1e9, -1e300, 100, 101)


@cache
def _film() -> str:
    """A video as a data URL; no two files are the same."""
    return data_url(webm(seconds=1), "video/webm")


@dataclass(frozen=True)
class Case:
    """A request, and whether it must be answered."""

    body: Json
    is_plain: bool


class RequestFuzzer:
    """Gives the same requests for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._schema = TypeAdapter(CompletionCreateParamsNonStreaming).json_schema()
        self._film = _film()
        self._picture = data_url(png())

    def case(self) -> Case:
        """The next request: half of them must be answered, the others may be refused."""
        if self._random.random() < 0.5:
            return Case(self._plain(), is_plain=True)
        makers: list[Callable[[], Json]] = [self._of_schema, self._of_engines, self._damaged]
        return Case(self._random.choice(makers)(), is_plain=False)

    def _plain(self) -> Json:
        """Fields that this server has, with right values, and neutral values of others."""
        body = {"model": MODEL, "messages": self._conversation()}
        neutral = VLLM | SGLANG
        for field in self._some(sorted(neutral), 6):
            body[field] = self._random.choice([neutral[field], None])
        for field in self._some(sorted(set(self._schema["properties"]) - body.keys()), 4):
            body[field] = None
        body |= self._pick(
            {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 3}, {"n": 3},
            {"use_beam_search": True, "n": 2}, {"num_beams": 3, "n": 2, "length_penalty": 0.5},
            {"use_beam_search": True, "best_of": 3, "n": 2, "temperature": 0},
            {"presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
            {"temperature": 2, "top_k": -1}, {"temperature": 1e-3, "seed": -5}, {"seed": 2**70},
        )  # fmt: skip
        body |= self._pick(
            {}, {"max_tokens": 3}, {"max_tokens": 10**9}, {"max_completion_tokens": 2},
            {"max_tokens": 5, "max_completion_tokens": 1}, {"stop": ["a", "b"]}, {"stop": "e"},
            {"logprobs": True, "top_logprobs": 5}, {"logprobs": True}, {"ignore_eos": True},
            {"max_frames": 2}, {"media_io_kwargs": {"video": {"num_frames": 3}}},
            {"cache_salt": "x"}, {"mm_processor_kwargs": {"max_frames": 2}},
        )  # fmt: skip
        body |= self._pick(
            {"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}, {},
            {"store": True, "metadata": {"a": "b"}}, {"user": "ann", "service_tier": "flex"},
            {"tool_choice": "none", "tools": []}, {"response_format": {"type": "text"}},
        )  # fmt: skip
        return body

    def _of_schema(self) -> Json:
        """Valid by OpenAI's schema."""
        body = self._instance(self._schema, depth=0) | {"model": MODEL}
        if self._random.random() < 0.7:
            body["messages"] = self._conversation()
        return body

    def _of_engines(self) -> Json:
        """Fields of vLLM and SGLang, of which some ask for what there is not."""
        body = self._plain()
        known = sorted(VLLM | SGLANG)
        for field in self._some(known, 3):
            body[field] = ASKS_FOR_MORE.get(field, self._anything(1))
        return body

    def _damaged(self) -> Json:
        """A plain request with other values in some places."""
        body = copy.deepcopy(self._plain())
        for _ in range(self._random.randint(1, 3)):
            self._damage(body)
        return body

    def _damage(self, value: Json) -> None:
        while True:
            places = list(value) if isinstance(value, dict) else list(range(len(value)))
            if not places:
                return
            place = self._random.choice(places)
            inner = value[place]
            if not isinstance(inner, dict | list) or not inner or self._random.random() < 0.3:
                break
            value = inner
        if isinstance(value, dict) and self._random.random() < 0.3:
            value[self._random.choice(["x", "", "url", "type", "a\nb", "n"])] = value.pop(place)
        else:
            value[place] = self._anything(2)

    def _conversation(self) -> Json:
        messages: list[Json]
        if self._random.random() < 0.3:
            messages = [{"role": "system", "content": "be brief"}]
        else:
            messages = []
        for _ in range(self._random.choice([0, 0, 1, 2])):
            messages.append({"role": "user", "content": self._text()})
            messages.append({"role": "assistant", "content": self._text(), "refusal": None})
        return [*messages, {"role": "user", "content": self._content()}]

    def _content(self) -> Json:
        """Content of the last message: not all turns may be empty."""
        text = self._text().strip() or "what is it?"
        parts: list[Json] = [{"type": "text", "text": text}]
        kind = self._random.random()
        if kind < 0.5:
            return text
        if kind < 0.75:
            parts.insert(0, {"type": "image_url", "image_url": {"url": self._picture}})
        elif kind < 0.85:
            parts.insert(0, {"type": "video_url", "video_url": {"url": self._film}})
        return parts

    def _text(self) -> str:
        return self._random.choice(SHORT)

    def _some(self, names: list[str], most: int) -> list[str]:
        return self._random.sample(names, self._random.randint(0, most))

    def _pick(self, *options: Json) -> Json:
        return self._random.choice(options)

    def _anything(self, depth: int) -> Json:
        """Any JSON value."""
        simple: list[Json] = [None, True, False, *INTEGERS, *NUMBERS, *TEXTS, *URLS, [], {}]
        kind = self._random.random()
        if depth == 0 or kind < 0.7:
            return self._random.choice(simple)
        items = [self._anything(depth - 1) for _ in range(self._random.randint(1, 3))]
        if kind < 0.85:
            return items
        return {self._random.choice(["type", "text", "url", "x", "role"]): item for item in items}

    def _instance(self, schema: Json, *, depth: int) -> Json:
        """A value that a JSON schema allows."""
        if "$ref" in schema:
            schema = self._schema["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._instance(self._random.choice(schema[key]), depth=depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._random.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                return self._object(schema, depth=depth)
            case "array":
                count = self._random.randint(0 if depth else 1, 2)
                return [self._instance(schema["items"], depth=depth + 1) for _ in range(count)]
            case "string":
                return self._random.choice(TEXTS + URLS)
            case "integer":
                return self._random.choice(INTEGERS)
            case "number":
                return self._random.choice(NUMBERS)
            case "boolean":
                return self._random.random() < 0.5
            case "null":
                return None
        return {}

    def _object(self, schema: Json, *, depth: int) -> Json:
        fields = schema.get("properties", {})
        chance = 0.12 if depth == 0 else 0.5
        chosen = [
            name
            for name in fields
            if name in schema.get("required", ()) or self._random.random() < chance
        ]
        made = {name: self._instance(fields[name], depth=depth + 1) for name in chosen}
        inner = schema.get("additionalProperties")
        if isinstance(inner, dict) and self._random.random() < 0.5:
            made[self._text()] = self._instance(inner, depth=depth + 1)
        return made
