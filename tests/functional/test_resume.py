"""A run killed at any moment and started again gives the digits of an uninterrupted one, and reads every pack once."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from recorded_run import run
from toy_run import make_toy_run

STEPS, PACKS = 12, 48
ALL_DEATHS = ["step:1", "step:3", "step:4", "step:5", "step:8", "step:11", "saving:4", "saving:8", "saving:12"]
DEATHS = ALL_DEATHS if os.environ.get("VITA_TEST_ALL") else ["saving:8"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    return run(recipe, tmp_path_factory.mktemp("uninterrupted"))


def test_a_run_reads_every_pack_once(uninterrupted: dict[int, dict]) -> None:
    assert sorted(uninterrupted) == list(range(1, STEPS + 1))
    assert sorted(pack for row in uninterrupted.values() for pack in row["packs"]) == list(range(PACKS))
    assert uninterrupted[STEPS]["loss"] < uninterrupted[1]["loss"] - 1


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_with_the_same_digits(
    recipe: Path, uninterrupted: dict[int, dict], tmp_path: Path, death: str
) -> None:
    before = run(recipe, tmp_path, death=death)
    after = run(recipe, tmp_path)
    assert before | after == uninterrupted
    first = min(after, default=STEPS + 1)
    kept = [pack for step, row in before.items() if step < first for pack in row["packs"]]
    assert sorted(kept + [pack for row in after.values() for pack in row["packs"]]) == list(range(PACKS))
