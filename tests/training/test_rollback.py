"""A run that is rolled back ends as one that never had the packs that it leaves out."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_vita.checkpoint.claim import Claim
from megatron_vita.cli.replay import read_replayed
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.data.batch import Batch
from megatron_vita.errors import (
    ClaimedError,
    ConfigError,
    DataError,
    StoppedError,
    VitaError,
)
from megatron_vita.report.reading import read_run
from megatron_vita.training import rollback
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.skipped import (
    SkippedPacks,
    SkippedRange,
    read_skipped,
    write_skipped,
)
from megatron_vita.training.step.batches import FinalBatches
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
from tests.training.damage import TENSORS, flip


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path).replaced(RULES)


@pytest.fixture(scope="module")
def reference(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Keeps:
    """The end of a run whose plan does not have the packs."""
    return train_without(recipe, tmp_path_factory.mktemp("reference"), LEFT_OUT)


@pytest.fixture(scope="module")
def rolled_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keeps]:
    class Counts(Callback):
        def before_step(self, run: Run) -> None:
            run.record("mine/steps", 1.0, reduce="sum")

    folder = tmp_path_factory.mktemp("rolled") / "checkpoints"
    fields = {"checkpoint.save": str(folder), "training.log_interval": 6}
    return folder, train_spoilt(recipe.replaced(fields), Counts())


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
        {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True},
    ],
    ids=["bf16", "replicated", "lora", "overlapped"],
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
    assert [row["mine/steps"] for row in rows if "mine/steps" in row] == [4.0]
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


class StopsIn(Callback):
    """Stops the run in a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def before_step(self, run: Run) -> None:
        if run.step + 1 == self._step:
            run.request_stop("a test")


class Phases(Callback):
    """Counts the reports of progress during a rollback by phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.restoring = 0
        monkeypatch.setattr(Run, "enter", lambda run, phase, **where: self.seen.append(phase))

    def on_fault(self, run: Run, report: Any) -> None:
        self.seen.clear()

    def on_rollback(self, run: Run, step: int) -> None:
        self.restoring = self.seen.count("restoring")


def test_nothing_is_left_of_a_save_of_steps_that_are_taken_back(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    here = recipe.replaced({"checkpoint.save": str(folder), "training.log_interval": 3})
    with pytest.raises(StoppedError, match="after step 5 of 6"):
        train_spoilt(here, StopsIn(5), step=9)
    assert (folder / "latest").read_text() == "step_00000005"
    # Rolled back to step 4, from where the recipe of now goes on.
    phases = Phases(monkeypatch)
    now = here.replaced({"checkpoint.retry_steps": 7})
    found = train_spoilt(now, phases, step=6)
    assert found.packs == packs_of(5, 24) | packs_of(6, 28)
    assert sorted(path.name for path in folder.glob("*step_*") if path.is_dir()) == [
        f"step_{step:08d}" for step in (2, 4, 6)
    ]
    assert [path.name for path in folder.glob("recipe_*")] == ["recipe_until_step_00000004.yaml"]
    tensors = json.loads((folder / "step_00000004" / "manifest.json").read_text())["files"]
    assert phases.restoring >= len(tensors["__0_0.distcp"])  # each is progress


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_run_that_ends_before_the_restore_resumes_as_rolled_back(
    recipe: Recipe, reference: Keeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    folder = tmp_path / "checkpoints"
    here = recipe.replaced({"checkpoint.save": str(folder)})

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(rollback, "restore_newest", fail)
        if way == "killed":
            with pytest.raises(RuntimeError, match="killed"):
                train_spoilt(here)
        else:
            with pytest.raises(
                StoppedError, match="in step 5 of 6, which is rolled back to step 2"
            ):
                train_spoilt(here, StopsIn(5))
    assert (folder / "latest").read_text() == "step_00000002"
    assert len(read_skipped(folder)) == 1
    record = read_run(folder)
    assert (sorted(record.steps), record.faults) == ([1, 2], {})
    with pytest.raises(ConfigError, match="has logged steps 1 to 2"):
        read_replayed(folder, 4)
    if way == "stopped":
        check_a_fault_that_is_rolled_back_is_no_step(folder)
        return
    resumed = Keeps()
    train(here, callbacks=[resumed])
    assert resumed.packs == packs_of(3, 8) | packs_of(4, 20) | packs_of(5, 24) | packs_of(6, 28)
    assert equal(resumed.end, reference.end)


def check_a_fault_that_is_rolled_back_is_no_step(folder: Path) -> None:
    """As of a run that was killed before it could note its rollback."""
    rows = [json.dumps(row) + "\n" for row in rows_of(folder) if row["event"] != "rollback"]
    (folder / "metrics.jsonl").write_text("".join(rows))
    assert sorted(read_run(folder).faults) == [5]
    with pytest.raises(ConfigError, match="has logged steps 1 to 4"):
        read_replayed(folder, 5)


class Damages(Callback):
    """Damages the checkpoint that a rollback is about to restore, and looks into new ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scored: list[tuple[int, bool]] = []

    def on_take_back(self, run: Run, step: int, *, back_to: int) -> None:
        flip(self._folder / f"step_{back_to:08d}" / TENSORS, 0.5)

    def on_save(self, run: Run, path: Path) -> None:
        self.scored.append((run.step, (path / "scores.json").exists()))


def test_nothing_is_known_of_steps_taken_back_by_a_restore_of_an_older_checkpoint(
    recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    fields = {
        "checkpoint.save": str(folder),
        "checkpoint.save_interval": 1,
        "checkpoint.keep_best": 1,
        "checkpoint.async_save": False,
        "training.eval_interval": 1,
        "training.train_iters": 4,
        "numerics.rollback_steps": 1,
    }
    damages = Damages(folder)
    train_spoilt(recipe.replaced(fields), damages, step=4)
    back_to = [row["step"] for row in rows_of(folder) if row["event"] == "rollback"]
    assert back_to == [3, 2]
    # A step is validated, and so scored, after its save.
    assert damages.scored == [(step, False) for step in (1, 2, 3, 3, 4)]


def test_a_job_that_has_lost_its_folder_sets_nothing_back(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"step_{step:08d}").mkdir()
    claim = Claim(tmp_path)
    claim.take()
    run: Any = SimpleNamespace(claim=claim, enter=lambda phase: None)
    Claim(tmp_path).take()
    with pytest.raises(ClaimedError):
        rollback._set_back(run, tmp_path / "step_00000002")
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [
        "step_00000002",
        "step_00000004",
    ]
    assert not (tmp_path / "latest").exists()


def test_a_batch_size_that_has_changed_since_the_checkpoint_is_refused(recipe: Recipe) -> None:
    run: Any = SimpleNamespace(recipe=recipe.replaced({"training.global_batch_size": 8}), step=4)
    resume = ResumePoint(
        checkpoint=Path("run/step_00000002"),
        step=2,
        consumed_packs=8,
        recipe=dataclasses.asdict(recipe),
    )
    with pytest.raises(VitaError, match=r"step 5: .*global_batch_size is 8, but 4 in run/step_"):
        rollback._range_to_skip(run, resume, target=3)


def test_an_error_of_the_loader_ends_the_wait_for_other_ranks(recipe_path: Path) -> None:
    def read() -> Any:
        yield from itertools.repeat(Mock(spec=Batch), 2)
        raise OSError("no answer")

    for taken in (0, 1, 2):
        batches = FinalBatches(read(), lambda pack: pack)  # type: ignore[arg-type, return-value]
        for _ in range(taken):
            next(batches)
        batches._thread.join(0.2)
        # All packs that are read ahead were begun, so that the thread reads on to its error.
        batches._begun += 5
        with pytest.raises(OSError, match="no answer"):
            batches.close_together()


def test_rollbacks_of_all_starts_are_bounded(recipe: Recipe, tmp_path: Path) -> None:
    changes = {"checkpoint.save": str(tmp_path / "checkpoints"), "numerics.max_rollbacks": 2}
    here = recipe.replaced(changes | {"numerics.rollback_steps": 1})
    message = r"step 3: loss .* after 2 rollbacks \(numerics.max_rollbacks\), in packs 17 to 20"
    with pytest.raises(VitaError, match=message):
        train_spoilt(here, step=3, times=9)
    events = [row["event"] for row in rows_of(tmp_path / "checkpoints")]
    assert (events.count("rollback"), events.count("fault"), events[-1]) == (2, 3, "error")
    faults = sorted(path.name for path in (tmp_path / "checkpoints" / "faults").iterdir())
    assert faults == [f"step_00000003_pack_{pack}.json" for pack in (13, 17, 9)]
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
    with pytest.raises(ConfigError, match=r"rollback, which checkpoint\.mirror s3://b cannot"):
        recipe.replaced({"checkpoint.save": "run", "checkpoint.mirror": "s3://b"})


def test_ranges_that_meet_or_lie_in_one_another_are_left_out_once() -> None:
    ranges = [(9, 12, 20), (10, 12, 24), (12, 4, 28), (13, 28, 32), (9, 12, 20)]
    skipped = SkippedPacks(SkippedRange(*numbers) for numbers in ranges)
    assert len(skipped) == 4
    assert skipped.firsts(0, steps=3, size=4) == [0, 32, 36]
    # A checkpoint of a run with another batch size may stand in one, or shortly before it.
    assert skipped.firsts(8, steps=2, size=4) == [32, 36]
    assert skipped.firsts(2, steps=2, size=4) == [32, 36]
    assert skipped.consumed_after(0, steps=2, size=4) == 36


@pytest.mark.parametrize("stop", [12, 4])
def test_a_range_without_packs_is_refused(tmp_path: Path, stop: int) -> None:
    with pytest.raises(ValueError, match=f"packs 12 to {stop}: the range is empty"):
        SkippedPacks([SkippedRange(5, 12, stop)])
    write_skipped(tmp_path, SkippedRange(5, 12, stop))
    with pytest.raises(DataError, match=f"skipped_packs.jsonl: .*packs 12 to {stop}: the range"):
        read_skipped(tmp_path)


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
