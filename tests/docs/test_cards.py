"""The page of cards has each recipe once, and names tests and sizes that exist."""

import re
from pathlib import Path

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
