"""The page of the first dataset does what it says, by copy and paste."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-dataset.md").read_text(encoding="utf-8")
FILES = re.compile(r"`([\w.]+)`:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def run(script: str, folder: Path) -> str:
    """Run commands, with `vita` and `python` on the path, and return what they print."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the page's files and the commands that an installation brings."""
    for name, text in FILES.findall(PAGE):
        (tmp_path / name).write_text(text)
    commands = {
        "vita": f'{sys.executable} -m megatron_vita "$@"',
        "python": f'{sys.executable} "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, command in commands.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/usr/bin/env bash\nexec {command}\n")
        script.chmod(0o755)
    return tmp_path


def test_the_page_has_its_files_and_commands() -> None:
    assert [name for name, _ in FILES.findall(PAGE)] == ["make_data.py", "recipe.yaml"]
    assert "vita train recipe.yaml" in "".join(COMMANDS.findall(PAGE))


@pytest.mark.full("two minutes of training")
def test_the_page_from_top_to_bottom(folder: Path) -> None:
    for commands in COMMANDS.findall(PAGE):
        output = run(commands, folder)
    assert output.strip() == "It is green."
    records = json.loads((folder / "llava.json").read_text())
    assert records[7]["conversations"][1]["value"] == "It is green."
