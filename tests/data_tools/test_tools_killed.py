"""Killed at any point and run again, each command ends with the bytes of an undisturbed run and
does nothing twice."""

import json
import random
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data_tools.cli import main
from tests.data_tools.toy_jsonl import sample, write_world
from tests.forked import start_program
from tests.scale import scaled

ROUNDS = scaled(1, full=12)
SOURCES = 24
SAMPLES = 192
EIGHT = ("--samples-per-shard", "8")


def command(name: str, root: Path) -> list[str]:
    """The command on a world under `root`, by two workers."""
    return {
        "import": [
            "import",
            "llava",
            f"{root}/sets",
            "--out",
            f"{root}/made/out.jsonl",
            "--media",
            f"{root}/media",
        ],
        "shard": [
            "shard",
            f"{root}/toy.jsonl",
            "--media",
            f"{root}/media",
            "--out",
            f"{root}/made/toy",
            *EIGHT,
        ],
        "index": ["index", f"{root}/recipe.yaml"],
        "validate": ["validate", f"{root}/recipe.yaml"],
    }[name] + ["--workers", "2"]


def prepare(name: str, root: Path) -> None:
    """Prepare the command's input: samples, some of them bad, in shards where the command reads
    shards."""
    path = write_world(root, count=SAMPLES)
    lines = path.read_text().splitlines()
    lines[50] = "{"
    lines[100] = json.dumps(sample(0) | {"images": ["none.png"]})
    path.write_text("\n".join(lines))
    (root / "recipe.yaml").write_text(
        (root / "recipe.yaml").read_text().replace(f"{root}/toy/", f"{root}/made/toy/")
    )
    if name == "import":
        (root / "sets").mkdir()
        for i in range(SOURCES):
            talks = [
                {"conversations": sample(k)["messages"], "image": f"{k}.png"}
                for k in range(100 * (1 + i % 7))
            ]
            (root / f"sets/{i:02d}.json").write_text(json.dumps([*talks, {"image": "none.png"}]))
    if name in ("index", "validate"):
        assert main(command("shard", root)) == 0
        shard = root / "made/toy/toy-000003.tar"
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x89PMG", 1))
        good = [
            line
            for i, line in enumerate((root / "toy.jsonl").read_text().splitlines())
            if i not in (50, 100)
        ]
        (root / "good.jsonl").write_text("\n".join(good))
        assert (
            main(
                [
                    "tokenizer",
                    f"{root}/good.jsonl",
                    "--out",
                    f"{root}/toy.model",
                    "--vocab-size",
                    "320",
                ]
            )
            == 0
        )


def files(root: Path) -> dict[str, bytes]:
    """All output files but progress files, whose lines are in the order in which work finished."""
    found = (
        path
        for path in sorted((root / "made").rglob("*"))
        if path.is_file() and "progress" not in path.name
    )
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def kill(name: str, root: Path, *, at: int, pause: float) -> None:
    """Run the command in a process, and kill it `pause` seconds after `at` parts are finished."""
    silent = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = start_program("-m", "data_tools", *command(name, root), **silent)
    while process.poll() is None and len(finished(name, root)) < at:
        time.sleep(0.002)
    time.sleep(pause)
    # Its workers notice its death a little later.
    workers = []
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def moments(path: Path) -> int:
    return path.stat().st_mtime_ns


def finished(name: str, root: Path) -> list[str]:
    """Files that are finished, and recorded so where the command keeps a record."""
    made = root / "made"
    progress = made / {"import": "out.progress.jsonl", "shard": "toy/progress.jsonl"}.get(
        name, "none"
    )
    if name in ("index", "validate"):
        suffix = {"index": "*.index.parquet", "validate": "*.quarantine.json"}[name]
        return [str(path.relative_to(root)) for path in made.rglob(suffix)]
    lines = progress.read_bytes().splitlines(keepends=True)[1:] if progress.exists() else []
    parts = [json.loads(line)["part"] for line in lines if line.endswith(b"\n")]
    pattern = {"import": "made/out.parts/{:06d}.samples.jsonl", "shard": "made/toy/toy-{:06d}.tar"}[
        name
    ]
    return [found for part in parts if (root / (found := pattern.format(part))).exists()]


@pytest.mark.parametrize("name", ["import", "shard", "index", "validate"])
def test_a_killed_command_run_again_ends_as_an_undisturbed_one(tmp_path: Path, name: str) -> None:
    root = tmp_path / "world"
    dice = random.Random(name)
    code = 1 if name == "validate" else 0
    prepare(name, root)
    shutil.copytree(root, tmp_path / "before")
    assert main(command(name, root)) == code
    wanted = files(root)
    for _ in range(ROUNDS):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "before", root)
        before: dict[str, int] = {}
        for at in (dice.randint(0, SOURCES // 2), dice.randint(SOURCES // 2, SOURCES)):
            kill(name, root, at=at, pause=dice.uniform(0, 0.02))
            assert all(
                moments(root / path) == moment
                for path, moment in before.items()
                if (root / path).exists()
            )
            before = {path: moments(root / path) for path in finished(name, root)}
            assert len(before) >= at or (name == "import" and (root / "made/out.jsonl").exists())
        assert main(command(name, root)) == code
        assert files(root) == wanted
        assert all(
            moments(root / path) == moment
            for path, moment in before.items()
            if (root / path).exists()
        )
        assert not [path for path in root.rglob("*") if path.suffix in (".partial", ".parts")]


@pytest.mark.parametrize(("name", "target"), [
    ("index", "toy-000005.quarantine.json"),
    ("index", "toy-000006.{stamp}.index.parquet"),
    ("validate", "toy-000007.quarantine.json"),
])  # fmt: skip
def test_a_temporary_file_beside_a_finished_one_is_removed(
    tmp_path: Path, name: str, target: str
) -> None:
    prepare(name, tmp_path)
    code = main(command(name, tmp_path))
    finished_files = files(tmp_path)
    stamps = [path.name.split(".")[1] for path in tmp_path.rglob("*.index.parquet")]
    partial = f"{target.format(stamp=stamps[0] if stamps else '')}.0123abcd.partial"
    (tmp_path / "made/toy" / partial).write_text("half")
    assert main(command(name, tmp_path)) == code
    assert files(tmp_path) == finished_files
