"""Recipe files of tests."""

from pathlib import Path

AWARE = ["training.bf16=true", "optimizer.use_precision_aware_optimizer=true"]


def write(tmp_path: Path, text: str) -> Path:
    """Write a recipe file, and return its path."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path
