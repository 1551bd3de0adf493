"""Chat templates of tokenizer folders: compiled and rendered as transformers does it, in a sandbox.

A template sees plain values only. `{% generation %}` blocks, which mark what an assistant says,
put a mark before and after what they enclose.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron_vita.errors import ConfigError

MARKS = "generation_marks"
"""The variable of a template that holds the two marks of generation blocks."""


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.Name(MARKS, "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def _marked(marks: tuple[str, str], caller: Callable[[], str]) -> str:
        opening, closing = marks
        return opening + caller() + closing


class _PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore, which could reach into Python."""

    def __init__(*args: Any, **fields: Any) -> None:  # `self` may be a field's name
        for name in dict(*args[1:], **fields):
            _refuse_private(name)
        Namespace.__init__(*args, **fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja2's own filter writes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. ConfigError if it is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _raise
    environment.globals["dict"] = _plain_dict
    environment.globals["namespace"] = _PlainNamespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is not valid: line {error.lineno}: {error.message}"
        ) from error


def _plain_dict(*pairs: Any, **fields: Any) -> dict[Any, Any]:
    """`dict` without its attributes."""
    return dict(*pairs, **fields)


def render(
    source: str,
    messages: list[dict[str, Any]],
    *,
    names: Mapping[str, str],
    add_generation_prompt: bool,
    marks: tuple[str, str] = ("", ""),
    date: str = "",
) -> str:
    """Render a conversation.

    `names` are the tokenizer's (bos_token ...), `marks` stand around generation blocks, and `date`
    is today (YYYY-MM-DD), if not the real one.

    Raises:
        jinja2.TemplateError: whatever the template objects to.
    """
    now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
    values = {
        **names,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": now.strftime,
        MARKS: marks,
    }
    try:
        return compile_template(source).render(values)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        # of Python, as by adding a list to a string
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
