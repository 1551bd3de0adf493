"""The command `vita`: its help, its commands, and what its start costs."""

import logging
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer

from megatron_vita import __version__, platform
from megatron_vita.cli.vita import COMMANDS, main
from megatron_vita.commands import run_command
from megatron_vita.inference.server import __main__ as server
from tests.environment import environment_with

HEAVY = ("torch", "megatron", "numpy", "transformers", "typer")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep commands from what only a process of their own may do."""
    monkeypatch.setattr(platform, "destroy_process_group", lambda: None)
    monkeypatch.setattr(platform, "set_up_logging", lambda rank: None)
    logger = logging.getLogger("megatron_vita")
    level = logger.level
    yield
    logger.setLevel(level)


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run a program in an interpreter of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment_with(), capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["trian"]])
def test_help_and_mistakes_import_nothing_heavy(arguments: list[str]) -> None:
    ran = run_python(
        "import sys; from megatron_vita.cli.vita import main; "
        f"main({arguments}); print(sorted({{*sys.modules}} & {{*{HEAVY}}}))"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown
        assert command.help in shown


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 1
    assert capsys.readouterr().err == "error: vita has no command 'trian'; did you mean train?\n"
    assert main(["?"]) == 1
    assert "known: train, plan, data" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron_vita {__version__}\n"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_by_its_name(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = pkgutil.resolve_name(COMMANDS[name].main)
    try:
        code = command(["--help"], name=f"vita {name}")
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 0
    assert f"vita {name}" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_a_user_error_of_a_command_is_one_line_and_code_1(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["data", "plan", "none.yaml"], ["chat"], ["evaluate", "questions", "x"]):
        assert main(arguments) == 1
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


def test_a_missing_extra_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def draw(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert run_command(app, ["matplotlib.pyplot"], name="x") == 1
    assert capfd.readouterr().err == (
        "error: matplotlib is not installed: pip install 'megatron-vita[eval]'\n"
    )
    with pytest.raises(ModuleNotFoundError, match="No module named 'elsewhere'"):
        run_command(app, ["elsewhere"], name="x")


def test_serving_names_its_missing_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(arguments: object) -> int:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(server, "run", run)
    monkeypatch.setattr(server, "leave", leave)
    with pytest.raises(SystemExit, match="1"):
        server.main(["checkpoint"])
    assert caplog.messages == ["fastapi is not installed: pip install 'megatron-vita[server]'"]
