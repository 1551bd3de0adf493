"""Sandboxed Jinja environment for chat templates, with the extensions of transformers.

A template sees plain values only. `{% generation %}` blocks, which enclose answers, are rendered
with a mark before and after them.
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
    """Jinja extension for `{% generation %}...{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 - read by jinja2

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
    """Serialize to JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        ConfigError: the template has a syntax error.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _raise
    # The types themselves have attributes from which a template could reach into Python.
    environment.globals["dict"] = _plain_dict
    environment.globals["namespace"] = _PlainNamespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is not valid: line {error.lineno}: {error.message}"
        ) from error


def _plain_dict(*pairs: Any, **fields: Any) -> dict[Any, Any]:
    """Build a dict; a function, since the type `dict` would expose its attributes."""
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

    Args:
        source: the chat template.
        messages: the conversation, as dicts of role and content.
        names: special tokens of the tokenizer by purpose (bos_token ...).
        add_generation_prompt: end with the opening of the next answer.
        marks: strings around generation blocks.
        date: today for the template (YYYY-MM-DD); empty: the real date.

    Raises:
        jinja2.TemplateError: the template refuses the conversation or fails.
    """
    if date:
        now = datetime.datetime.fromisoformat(date)
    else:
        now = datetime.datetime.now()
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
        # Errors of Python inside a template, as by adding a list to a string.
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
