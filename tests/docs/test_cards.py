"""The page of cards has each recipe once, and names tests and sizes that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+/\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
RECIPES = [
    path.relative_to(ROOT / "examples").with_suffix("").as_posix().removeprefix("long_vita/")
    for pattern in ("easy_vqa/stage*.yaml", "long_vita/*b/*.yaml")
    for path in sorted((ROOT / "examples").glob(pattern))
]


def test_each_recipe_has_a_card() -> None:
    assert sorted(ROWS) == sorted(RECIPES)


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if re.match(r"\d+b/stage", recipe)]
)
def test_sizes_of_dry_runs_are_those_of_their_test(recipe: str) -> None:
    worlds = (ROOT / "tests" / "examples" / "test_long_vita.py").read_text(encoding="utf-8")
    size = recipe.partition("/")[0]
    tested = re.search(rf'full={{.*"{size}": \[(\d+), (\d+)\]', worlds)
    assert tested
    assert ROWS[recipe].startswith(f"{tested[1]} and {tested[2]} GPUs")


def test_tests_that_cards_name_exist() -> None:
    for file, name in re.findall(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`", PAGE):
        path = ROOT / file
        assert path.exists(), file
        assert not name or f"def {name}(" in path.read_text(encoding="utf-8"), name


def steps_cell(record: dict[str, Any]) -> str:
    """The cell of a card about measured steps."""
    thousands = record["tokens"] // 1024
    tokens = f"{thousands // 1024}M" if thousands >= 1024 else f"{thousands}K"
    documents = f"{record['documents']} document" + "s" * (record["documents"] > 1)
    return (
        f"{record['model'].upper()}, {tokens} tokens, {documents}, {record['tiles']:,} tiles: "
        f"{record['tflops_per_gpu']:.0f} TFLOP/s/GPU, "
        f"{record['gpus']} x {record['device'].removeprefix('NVIDIA ')}"
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_of_gpu_steps_are_those_of_their_record(recipe: str) -> None:
    steps = ROWS[recipe].split(" | ")[2]
    if steps == "no":
        return
    link = re.fullmatch(r"\[(.*)\]\(\.\./(benchmarks/baselines/[\w-]+\.json)\)", steps)
    assert link, f"{recipe}: {steps}: a link to a record is needed"
    record = json.loads((ROOT / link[2]).read_text(encoding="utf-8"))
    assert link[1] == steps_cell(record)
    assert record["status"] == "complete"
    assert recipe.startswith(record["model"])
