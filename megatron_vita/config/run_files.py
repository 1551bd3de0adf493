"""Names of what lies in a run's folder."""

from pathlib import Path

from megatron_vita.config.recipe import Recipe

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.jsonl"
METRICS = "metrics.jsonl"
LOG = "log.txt"
LEDGERS = "damaged"
FAULTS = "faults"
SKIPPED_PACKS = "skipped_packs.jsonl"


def run_folder(recipe: Recipe) -> Path | None:
    """`training.run_dir`, or else the folder of the checkpoints; None where a run has neither."""
    name = recipe.training.run_dir or recipe.checkpoint.save
    return Path(name) if name else None
