"""How command lines end: what a user can cause is one line on stderr, `error: ...`, and exit code
1."""

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


def run_command(app: typer.Typer, arguments: list[str], *, name: str) -> int:
    """Runs one command of `app`, which help calls `name`, and gives its exit code."""
    try:
        return int(app(arguments, prog_name=name, standalone_mode=False) or 0)
    except VitaError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = describe_missing(error)
    except typer.TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 1
