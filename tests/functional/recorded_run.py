"""Runs of a toy recipe in processes that may die, with a record of every step."""

import json
from pathlib import Path

from tests.functional.launch import torchrun


def run(
    recipe: Path, folder: Path, *overrides: str, death: str = "never", processes: int = 2
) -> dict[int, dict]:
    """Train until done or dead; return what each step recorded on all ranks."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("records.*"):
        old.unlink()
    arguments = [
        str(recipe),
        str(folder / "records"),
        death,
        f"checkpoint.save={folder / 'checkpoints'}",
        *overrides,
    ]
    ended = torchrun("resume_worker.py", *arguments, processes=processes, check=death == "never")
    assert (ended.returncode == 0) == (death == "never")
    steps: dict[int, dict] = {}
    for file in sorted(folder.glob("records.*")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            merged = steps.setdefault(row["step"], row | {"packs": []})
            merged["packs"] += row["packs"]
    return steps
