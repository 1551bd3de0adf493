"""How command lines end: what a user can cause is one line on stderr, `error: ...`, and exit code
1."""

import typer

from megatron_vita.errors import VitaError


def run_command(app: typer.Typer, arguments: list[str], *, name: str) -> int:
    """Runs one command of `app`, which help calls `name`, and gives its exit code."""
    try:
        return int(app(arguments, prog_name=name, standalone_mode=False) or 0)
    except VitaError as error:
        message = str(error)
    except typer.TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 1
