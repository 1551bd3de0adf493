"""Options of command lines that are derived from dataclasses."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest
import typer

from megatron_vita.commands import add_options, from_arguments, run_command, takes_options
from megatron_vita.config.parsing.fields import described
from megatron_vita.errors import ConfigError
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.server.__main__ import parse_arguments
from megatron_vita.inference.server.protocol.protocol import ChatRequest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields of every supported type."""

    count: int = described(1, "A number, 100 % whole.")
    most: float | None = described(None, "No limit by default.")
    kind: Literal["one", "two"] = described("one", "A choice.")
    hidden: int = 7

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count is {self.count}: it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class TerminalSettings(Settings):
    """The same with the types that only typer commands take."""

    words: tuple[str, ...] = described((), "Words.")
    loud: bool = described(False, "A flag.")


def from_terminal(*arguments: str) -> TerminalSettings | None:
    app = typer.Typer(add_completion=False)
    found = []

    @app.command()
    @takes_options(TerminalSettings, into="settings")
    def show(name: str, *, settings: TerminalSettings) -> int:
        assert name == "name"
        found.append(settings)
        return 0

    code = run_command(app, ["name", *arguments], name="show")
    assert code == (0 if found else 1)
    return next(iter(found), None)


def from_parser(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument_group("settings"), Settings)
    parser.format_help()  # a lone percent sign would break it
    return from_arguments(Settings, parser.parse_args(arguments))


def test_a_typer_command_receives_the_dataclass_that_its_options_describe() -> None:
    assert from_terminal() == TerminalSettings()
    given = ("--count", "3", "--most", "0.5", "--words", "a", "--words", "b c", "--loud")
    assert from_terminal(*given) == TerminalSettings(
        count=3, most=0.5, words=("a", "b c"), loud=True
    )


def test_a_parser_builds_the_dataclass_that_its_options_describe() -> None:
    assert from_parser() == Settings()
    given = ("--count", "3", "--most", "0.5", "--kind", "two")
    assert from_parser(*given) == Settings(count=3, most=0.5, kind="two")


def test_undocumented_fields_and_other_choices_are_no_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert from_terminal("--hidden", "3") is None
    assert "--hidden" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        from_parser("--kind", "three")


def test_values_that_the_dataclass_refuses_are_a_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert from_terminal("--count", "-1") is None
    assert capsys.readouterr().err == "error: count is -1: it must be at least 0\n"
    with pytest.raises(ConfigError, match="count is -1"):
        from_parser("--count", "-1")


def test_the_server_offers_the_documented_engine_options() -> None:
    given = ["--cache-dtype", "fp8", "--chunk-tokens", "64", "--max-context", "100"]
    options = from_arguments(EngineOptions, parse_arguments(["checkpoint", *given]))
    assert options == EngineOptions(cache_dtype="fp8", chunk_tokens=64, max_context=100)
    assert from_arguments(EngineOptions, parse_arguments(["checkpoint"])) == EngineOptions()


def test_every_sampling_parameter_is_documented_and_a_field_of_requests() -> None:
    fields = dataclasses.fields(SamplingParams)
    assert all(field.metadata["doc"] for field in fields)
    asked = {"max_tokens" if f.name == "max_new_tokens" else f.name for f in fields}
    assert asked <= ChatRequest.model_fields.keys()
