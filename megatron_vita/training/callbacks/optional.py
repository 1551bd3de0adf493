"""Optional packages of callbacks, and the runs that trackers know."""

import importlib.util
import json
from pathlib import Path

from megatron_vita.config import Recipe
from megatron_vita.errors import PlatformError

TRACKERS = "trackers.json"
NEEDED = {"wandb_project": ("wandb", "wandb"), "mlflow_experiment": ("mlflow", "mlflow-skinny")}
"""Module and package by the field of `training` that asks for it."""


def check_packages(recipe: Recipe) -> None:
    """Check that what the recipe logs to is installed.

    Raises:
        PlatformError: naming the field and the package to install.
    """
    for field, (module, package) in NEEDED.items():
        value = getattr(recipe.training, field)
        if value and importlib.util.find_spec(module) is None:
            raise PlatformError(
                f"training.{field} is {value!r}, but {module} is not installed: pip install {package}"
            )


def known_run(folder: Path | None, tracker: str) -> str:
    """Return a tracker's id of the run in a folder; empty if the tracker has none."""
    if folder is None or not (folder / TRACKERS).exists():
        return ""
    return json.loads((folder / TRACKERS).read_text()).get(tracker, "")


def note_run(folder: Path | None, tracker: str, run_id: str) -> None:
    """Record a tracker's id of the run, so that later starts continue it."""
    if folder is None:
        return
    path = folder / TRACKERS
    known = json.loads(path.read_text()) if path.exists() else {}
    written = path.with_suffix(".new")
    written.write_text(json.dumps(known | {tracker: run_id}))
    written.replace(path)
