"""A run that is rolled back ends as one that never had the packs that it leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import Recipe, load_recipe
from megatron_vita.errors import ConfigError, DataError, StoppedError, VitaError
from megatron_vita.report.reading import read_run
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.run import Run
from megatron_vita.training.skipped import (
    SkippedPacks,
    SkippedRange,
    read_skipped,
    write_skipped,
)
from tests.functional.poison import equal
from tests.functional.rollback_runs import (
    LEFT_OUT,
    RULES,
    SIZE,
    Keeps,
    check_rollback,
    train_spoilt,
    train_without,
)


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path).replaced(RULES)


@pytest.fixture(scope="module")
def reference(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Keeps:
    """The end of a run whose plan does not have the packs."""
    return train_without(recipe, tmp_path_factory.mktemp("reference"), LEFT_OUT)


@pytest.fixture(scope="module")
def rolled_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keeps]:
    folder = tmp_path_factory.mktemp("rolled") / "checkpoints"
    return folder, train_spoilt(recipe.replaced({"checkpoint.save": str(folder)}))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def packs_of(step: int, first: int) -> dict[int, set[int]]:
    return {step: set(range(first, first + SIZE))}


def test_later_weights_are_those_of_a_run_without_the_packs(
    rolled_back: tuple[Path, Keeps], reference: Keeps
) -> None:
    _, spoilt = rolled_back
    assert equal(spoilt.end, reference.end)
    expected = packs_of(1, 0) | packs_of(2, 4) | packs_of(3, 8)
    expected |= packs_of(4, 20) | packs_of(5, 24) | packs_of(6, 28)
    assert spoilt.packs == expected


@pytest.mark.full("two more runs each; the rule for a distributed optimizer in fp32 is above")
@pytest.mark.parametrize(
    "fields",
    [
        {"training.bf16": True},
        {"parallel.use_distributed_optimizer": False},
        {"lora.rank": 2, "training.freeze_language_model": True},
    ],
    ids=["bf16", "replicated", "lora"],
)
def test_every_kind_of_optimizer_state_is_restored(
    recipe: Recipe, tmp_path: Path, fields: dict[str, Any]
) -> None:
    check_rollback(recipe.replaced(fields), tmp_path)


def test_records_of_a_rolled_back_run_hold_each_step_once(
    rolled_back: tuple[Path, Keeps],
) -> None:
    folder, _ = rolled_back
    rows = rows_of(folder)
    (fault,) = [row for row in rows if row["event"] == "fault"]
    assert (fault["step"], fault["action"], fault["packs"]) == (5, "rollback", [17, 18, 19, 20])
    (rollback,) = [row for row in rows if row["event"] == "rollback"]
    assert (rollback["step"], rollback["faulty"]) == (2, 5)
    steps = [row["step"] for row in rows if row["event"] == "step"]
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6]
    record = read_run(folder)
    assert sorted(record.steps) == [1, 2, 3, 4, 5, 6]
    assert len(record.segments) == 1
    (line,) = (folder / "skipped_packs.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 5, "start": 12, "stop": 20}


def test_a_run_that_is_stopped_while_steps_are_done_again_leaves_the_packs_out_too(
    recipe: Recipe, reference: Keeps, tmp_path: Path
) -> None:
    class Stops(Callback):
        def on_rollback(self, run: Run, step: int) -> None:
            run.request_stop("a test")

    here = recipe.replaced({"checkpoint.save": str(tmp_path / "checkpoints")})
    with pytest.raises(StoppedError, match="after step 3 of 6"):
        train_spoilt(here, Stops())
    resumed = Keeps()
    train(here, callbacks=[resumed])
    assert resumed.packs == packs_of(4, 20) | packs_of(5, 24) | packs_of(6, 28)
    assert equal(resumed.end, reference.end)


def test_rollbacks_of_all_starts_are_bounded(recipe: Recipe, tmp_path: Path) -> None:
    changes = {"checkpoint.save": str(tmp_path / "checkpoints"), "numerics.max_rollbacks": 2}
    here = recipe.replaced(changes | {"numerics.rollback_steps": 1})
    message = r"step 3: loss .* after 2 rollbacks \(numerics.max_rollbacks\), in packs 17 to 20"
    with pytest.raises(VitaError, match=message):
        train_spoilt(here, step=3, times=9)
    events = [row["event"] for row in rows_of(tmp_path / "checkpoints")]
    assert (events.count("rollback"), events.count("fault"), events[-1]) == (2, 3, "error")
    # Started again, the run does not begin to count anew.
    with pytest.raises(VitaError, match=message):
        train_spoilt(here, step=3, times=9)


def test_a_rollback_without_a_checkpoint_to_go_back_to_says_what_to_change(
    recipe: Recipe, tmp_path: Path
) -> None:
    here = recipe.replaced({"checkpoint.save": str(tmp_path / "checkpoints")})
    with pytest.raises(VitaError, match=r"step 3: .*no checkpoint of step 1 or before"):
        train_spoilt(here, step=3)
    assert not (tmp_path / "checkpoints" / "skipped_packs.jsonl").exists()


def test_a_plan_that_is_too_short_without_the_packs_is_named(
    recipe: Recipe, tmp_path: Path
) -> None:
    class Shortens(Callback):
        def on_fault(self, run: Run, report: Any) -> None:
            assert run.train_stream is not None
            run.train_stream.plan.num_packs = 24  # just enough for the steps

    here = recipe.replaced({"checkpoint.save": str(tmp_path / "checkpoints")})
    with pytest.raises(VitaError, match=r"needs 32 packs, but the plan .* holds 24"):
        train_spoilt(here, Shortens())


def test_rollback_needs_a_folder_for_checkpoints(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"rollback, which needs checkpoint\.save"):
        recipe.replaced({"checkpoint.save": ""})


def test_ranges_that_meet_or_lie_in_one_another_are_left_out_once() -> None:
    ranges = [(9, 12, 20), (10, 12, 24), (12, 4, 28), (13, 24, 32)]
    skipped = SkippedPacks(SkippedRange(*numbers) for numbers in ranges)
    assert len(skipped) == 4
    assert skipped.firsts(0, steps=4, size=4) == [0, 28, 32, 36]
    # A run that has come past the beginning of one, and to that of another.
    assert skipped.firsts(8, steps=3, size=4) == [8, 32, 36]
    assert skipped.consumed_after(8, steps=1, size=4) == 12


def test_the_file_is_read_as_written_and_refused_by_name_if_it_is_another(tmp_path: Path) -> None:
    assert len(read_skipped(tmp_path)) == 0
    write_skipped(tmp_path, SkippedRange(5, 12, 20))
    write_skipped(tmp_path, SkippedRange(9, 20, 24))
    with (tmp_path / "skipped_packs.jsonl").open("a") as file:
        file.write('{"torn')
    assert read_skipped(tmp_path).firsts(12, steps=1, size=4) == [24]
    (tmp_path / "skipped_packs.jsonl").write_text('{"pack": 3}\n')
    with pytest.raises(DataError, match=r"skipped_packs.jsonl: not a list"):
        read_skipped(tmp_path)
