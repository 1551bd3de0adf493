"""A run killed at any moment and started again gives the digits of an uninterrupted one, and reads
every pack once.

Layers are recomputed but for attention, MLPs in pieces, the tower from pixels; once started again,
activations wait on the host, which changes no digit.
"""

from pathlib import Path

import pytest

from tests.functional.recorded_run import run
from tests.functional.toy_run import make_toy_run
from tests.scale import scaled

STEPS = 12
PACKS = 48
ALL_DEATHS = [
    "step:1",
    "step:3",
    "step:4",
    "step:5",
    "step:8",
    "step:11",
    "saving:4",
    "saving:8",
    "saving:12",
    "publishing:8",
]
LEVERS = [
    "training.recompute_granularity=full",
    "training.recompute_keep_attention_layers=1",
    "training.mlp_chunk_tokens=100",
    "training.recompute_vision=true",
    "training.recompute_vision_method=tiles",
    "training.vision_tiles_at_once=3",
]
OFFLOADED = ["training.activation_offload_fraction=1"]
DEATHS = scaled(["saving:8"], full=ALL_DEATHS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    return run(recipe, tmp_path_factory.mktemp("uninterrupted"), *LEVERS)


def test_a_run_reads_every_pack_once(uninterrupted: dict[int, dict]) -> None:
    assert sorted(uninterrupted) == list(range(1, STEPS + 1))
    assert sorted(pack for row in uninterrupted.values() for pack in row["packs"]) == list(
        range(PACKS)
    )
    assert uninterrupted[STEPS]["loss"] < uninterrupted[1]["loss"] - 1


def test_each_replica_writes_its_share_of_a_checkpoint(
    uninterrupted: dict[int, dict], tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = (
        tmp_path_factory.getbasetemp() / "uninterrupted0" / "checkpoints" / f"step_{STEPS:08d}"
    ).glob("*.distcp")
    sizes = {file.name.split("_")[2]: file.stat().st_size for file in files}
    assert sorted(sizes) == ["0", "1"]
    assert min(sizes.values()) > 0.5 * max(sizes.values())


@pytest.mark.full("two minutes; test_training.py has the rule for one process")
@pytest.mark.parametrize("told", ["term:5", "usr1:6"])
def test_a_run_that_is_told_to_stop_saves_after_its_next_step(
    recipe: Path, uninterrupted: dict[int, dict], tmp_path: Path, told: str
) -> None:
    before = run(recipe, tmp_path, *LEVERS, death=told)
    last = int(told[-1]) + 1
    assert sorted(before) == list(range(1, last + 1))
    after = run(recipe, tmp_path, *LEVERS, *OFFLOADED)
    assert sorted(after) == list(range(last + 1, STEPS + 1))
    assert before | after == uninterrupted


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_with_the_same_digits(
    recipe: Path, uninterrupted: dict[int, dict], tmp_path: Path, death: str
) -> None:
    before = run(recipe, tmp_path, *LEVERS, death=death)
    after = run(recipe, tmp_path, *LEVERS, *OFFLOADED)
    assert before | after == uninterrupted
    first = min(after, default=STEPS + 1)
    kept = [pack for step, row in before.items() if step < first for pack in row["packs"]]
    assert sorted(kept + [pack for row in after.values() for pack in row["packs"]]) == list(
        range(PACKS)
    )
