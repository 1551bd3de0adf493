"""Command lines: options derived from dataclasses, and user errors as one line with exit code 1.

A dataclass field with documentation (`described` in config.parsing.fields) becomes an option. Its name,
type, default and help come from the field, so that a new setting is written in one place only.
"""

import argparse
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import GenericAlias, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from megatron_vita.errors import VitaError

EXTRAS = {
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic"), "server"),
    **dict.fromkeys(("prometheus_client", "httpcore"), "server"),
    "matplotlib": "eval",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
"""Extras of the package that bring a module."""


def describe_missing(error: ModuleNotFoundError) -> str:
    """Say in one line what to install for a module that an extra brings.

    Raises:
        ModuleNotFoundError: `error` itself, for a module that no extra brings.
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    return f"{module} is not installed: pip install 'megatron-vita[{EXTRAS[module]}]'"


Command = Callable[..., int | None]


@dataclass(frozen=True, kw_only=True)
class FieldOption:
    """The option of a command line for one field of a dataclass."""

    field: str
    type: Any  # of a single value; None is not part of it
    default: Any
    doc: str
    is_repeated: bool  # the field is a tuple, and the option may be given several times

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--{self.field.replace('_', '-')}"


def field_options(group: type) -> Iterator[FieldOption]:
    """Yield an option for each documented field of a dataclass; other fields are not offered."""
    types = get_type_hints(group)
    for field in dataclasses.fields(group):
        if "doc" in field.metadata:
            kind = _without_none(types[field.name])
            is_repeated = get_origin(kind) is tuple
            yield FieldOption(
                field=field.name,
                type=get_args(kind)[0] if is_repeated else kind,
                default=field.default,
                doc=field.metadata["doc"],
                is_repeated=is_repeated,
            )


def _without_none(kind: Any) -> Any:
    kinds = [one for one in get_args(kind) if one is not NoneType]
    # a union with None has one other member here; Literal and tuple also have arguments
    if NoneType in get_args(kind):
        return kinds[0]
    return kind


def takes_options[T](group: type[T], *, into: str) -> Callable[[Command], Command]:
    """Decorate a typer command with the options of a dataclass.

    Args:
        group: the dataclass.
        into: the command's parameter that receives the instance.
    """
    options = list(field_options(group))

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**arguments: Any) -> int | None:
            values = {option.field: arguments.pop(option.field) for option in options}
            for option in options:
                if option.is_repeated:
                    values[option.field] = tuple(values[option.field] or ())
            return command(**arguments, **{into: group(**values)})

        own = inspect.signature(command).parameters.values()
        kept = [parameter for parameter in own if parameter.name != into]
        # typer reads parameters from the signature, and calls with keywords
        run.__signature__ = inspect.Signature([*kept, *map(_parameter, options)])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(option: FieldOption) -> inspect.Parameter:
    kind = option.type
    default = option.default
    if option.is_repeated:
        kind = GenericAlias(list, (kind,))
        default = None
    if default is None:
        kind = kind | None
    # a flag named explicitly has no --no- form, and no short form such as -n
    return inspect.Parameter(
        option.field,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(option.flag, help=option.doc)],
    )


def add_options(parser: argparse._ArgumentGroup, group: type) -> None:
    """Add the options of a dataclass to an argparse group; repeated fields are not supported."""
    for option in field_options(group):
        assert not option.is_repeated, option.field
        is_choice = get_origin(option.type) is Literal
        # a default of None stands for something that the documentation describes
        ending = "" if option.default is None else " (default: %(default)s)"
        parser.add_argument(
            option.flag,
            type=str if is_choice else option.type,
            choices=get_args(option.type) if is_choice else None,
            default=option.default,
            help=option.doc.replace("%", "%%") + ending,
        )


def from_arguments[T](group: type[T], arguments: argparse.Namespace) -> T:
    """Build a dataclass from the options that `add_options` has added.

    Raises:
        ConfigError: the dataclass refuses a value.
    """
    return group(
        **{option.field: getattr(arguments, option.field) for option in field_options(group)}
    )


def run_command(app: typer.Typer, arguments: list[str], *, name: str) -> int:
    """Run one command of `app`, which help texts call `name`.

    Returns:
        The exit code: 1 for a user's error, which is printed as one line `error: ...`.
    """
    try:
        return int(app(arguments, prog_name=name, standalone_mode=False) or 0)
    except VitaError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = describe_missing(error)
    except typer.TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
    # In one line, so that scripts can read it: messages of libraries hold line breaks.
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 1
