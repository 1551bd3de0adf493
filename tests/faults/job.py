"""A toy run of many steps in processes that may be killed, and what it comes to."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_vita.convert.families.mapping import TensorLocation
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from tests.functional.launch import torchrun
from tests.functional.toy_run import data_tools, make_toy_run

HERE = Path(__file__).parent
BATCH = 2
SETTINGS = [
    f"training.global_batch_size={BATCH}",
    "training.eval_interval=0",
    "checkpoint.save_interval=5",
    "checkpoint.keep=3",
    "data.num_workers=1",
]


def make_run(folder: Path, *, steps: int) -> Path:
    """Put data, plan and recipe of a run of `steps` steps into a folder; return the recipe."""
    recipe = make_toy_run(folder)
    values = yaml.safe_load(recipe.read_text())
    # 90 samples make 12 packs an epoch or more.
    values["data"] |= {"epochs": 2 + steps * BATCH // 12, "plan": str(folder / "long_plan")}
    values["training"]["train_iters"] = steps
    recipe.write_text(yaml.safe_dump(values))
    data_tools("plan", recipe)
    return recipe


def start(
    recipe: Path,
    folder: Path,
    *overrides: str,
    faults: Sequence[dict[str, Any]] = (),
    ranks: int = 2,
    worker: str = "worker.py",
) -> int:
    """Run until the run is done, or a fault has ended it; return the launcher's exit code.

    `worker` is the program of the ranks, in this folder.
    """
    folder.mkdir(exist_ok=True)
    number = len(list(folder.glob("stderr.*")))
    ended = torchrun(
        HERE / worker,
        str(recipe),
        str(folder / f"records.{number}"),
        json.dumps(list(faults)),
        f"checkpoint.save={folder / 'checkpoints'}",
        *SETTINGS,
        *overrides,
        processes=ranks,
        check=False,
        seconds=600,
    )
    (folder / f"stderr.{number}").write_text(ended.stderr)
    return ended.returncode


def last_tensors(folder: Path) -> dict[str, int]:
    """Return a checksum of each tensor of the latest checkpoint, weights and optimizer's, by key."""
    checkpoints = folder / "checkpoints"
    source = DistSource(checkpoints / (checkpoints / "latest").read_text())
    tensors = {key: source.read(TensorLocation(key)) for key in source.infos}
    return {
        key: zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        for key, tensor in tensors.items()
    }


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Return what is recorded of each step, with the packs of all ranks, by the last start that did the step."""
    steps: dict[int, dict[str, Any]] = {}
    for path in folder.glob("records.*"):
        start = int(path.name.split(".")[1])
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if steps.get(row["step"], {"start": -1})["start"] < start:
                steps[row["step"]] = row | {"start": start, "packs": set()}
            if steps[row["step"]]["start"] == start:
                # The ranks of a replica consume the same packs.
                steps[row["step"]]["packs"] |= set(row["packs"])
    return steps


def packs_of(folder: Path) -> list[int]:
    """Return the packs that the run consists of, in order of their numbers."""
    return sorted(pack for step in steps_of(folder).values() for pack in step["packs"])
