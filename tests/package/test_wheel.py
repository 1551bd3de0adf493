"""The wheel: what it holds, and that all of it works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.environment import ROOT
from tests.functional.toy_run import toy_recipe

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--no-cache-dir", "--wheel-dir", str(out), str(ROOT)], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel; dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a program of the installed environment in a folder that is not the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess:
        ran = subprocess.run(
            [str(installed / program), *arguments],
            cwd=tmp_path,
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        return ran

    return call


def test_the_wheel_holds_both_packages_with_their_data(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        str(path.relative_to(ROOT))
        for package in ("megatron_vita", "data_tools")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in held if ".dist-info/" not in name} == tracked
    for name in (
        "server/page.html",
        "report/page.css",
        "megatron_vita/py.typed",
        "data_tools/py.typed",
    ):
        assert any(path.endswith(name) for path in held)


def test_the_wheel_declares_ranges_extras_and_the_command(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(texts["METADATA"]).decode()
        commands = archive.read(texts["entry_points.txt"]).decode()
    assert "Requires-Dist: torch<2.12,>=2.11" in metadata
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "vita = megatron_vita.cli.vita:main" in commands


def test_the_installed_command_runs_outside_the_checkout(run: Run) -> None:
    assert "usage: vita" in run("vita", "--help").stdout
    where = run("python", "-c", "import megatron_vita as m; print(m.__file__)").stdout
    assert "site-packages" in where
    assert str(ROOT) not in where


def _write_data(folder: Path) -> None:
    """Samples with pictures, and a recipe whose paths are relative."""
    (folder / "photos").mkdir()
    rows = []
    for index in range(24):
        color = ("red", "green", "blue")[index % 3]
        Image.new("RGB", (16, 16), color).save(folder / "photos" / f"{index}.png")
        question = {"role": "user", "content": f"<image>what color is number {index}?"}
        answer = {"role": "assistant", "content": f"it is {color}"}
        rows.append({"messages": [question, answer], "images": [f"{index}.png"]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = toy_recipe(Path())
    recipe["training"] |= {"train_iters": 2, "eval_interval": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.full("trains, with two processes")
def test_data_training_and_chat_work_from_the_wheel(run: Run, tmp_path: Path) -> None:
    _write_data(tmp_path)
    run("vita", "data", "tokenizer", "samples.jsonl", "--out", "toy.model", "--vocab-size", "310")
    run("vita", "data", "shard", "samples.jsonl", "--out", "shards", "--media", "photos")
    run("vita", "data", "index", "recipe.yaml")
    run("vita", "data", "plan", "recipe.yaml")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    trained = run("python", *launcher, "-m", "megatron_vita", "train", "recipe.yaml")
    assert "step 2/2" in trained.stdout + trained.stderr
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    for name in ("toy.model", "samples.jsonl", "recipe.yaml"):
        (tmp_path / name).unlink()
    for name in ("shards", "plan"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "black.png")
    question = ["--image", "black.png", "what color is it?"]
    run("vita", "chat", "elsewhere", "--max-new-tokens", "3", *question)
