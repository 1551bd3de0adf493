"""A logged step is replayed bit for bit from the checkpoint before it, and a wrong one is named."""

import json
import math
import shutil
from pathlib import Path

import pytest

from megatron_vita import platform
from megatron_vita.cli.replay import read_replayed, replay_run
from megatron_vita.cli.vita import main
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.training.loop import train
from tests.functional.rollback_runs import RULES, train_spoilt

SKIPS = {"numerics.nonfinite_action": "skip", "numerics.rollback_steps": 1}


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path).replaced(RULES)


@pytest.fixture(scope="module")
def saved(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps, of which the third was skipped."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    train_spoilt(recipe.replaced(SKIPS | {"checkpoint.save": str(folder)}), step=3)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the folder, elsewhere."""
    return Path(shutil.copytree(saved, tmp_path / "moved"))


def change_log(folder: Path, step: int, name: str, value: float | None) -> float | None:
    """Replace what is logged of a step; returns what was."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = [row for row in rows if row["event"] == "step" and row["step"] == step]
    before: float | None = row[name]
    row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return before


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in sorted(folder.rglob("*"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def test_every_step_is_as_logged_and_the_folder_as_before(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(folder)
    with caplog.at_level("INFO"):
        replay_run(folder, 6)
    lines = [line for line in caplog.messages if line.endswith("as logged")]
    assert [line.split(":")[0] for line in lines] == ["step 5", "step 6"]
    assert contents(folder) == before


def test_a_step_before_the_first_checkpoint_is_replayed_from_the_start(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        replay_run(folder, 1)
    assert "step 1: " in caplog.text
    assert "as logged" in caplog.text


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm"])
def test_a_step_whose_last_bit_differs_is_named(folder: Path, name: str) -> None:
    value = change_log(folder, 5, name, 0.0)
    assert value is not None
    change_log(folder, 5, name, math.nextafter(value, math.inf))
    with pytest.raises(VitaError, match=r"steps 5 to 5 were replayed; not as logged: 5$"):
        replay_run(folder, 5)


def test_seven_digits_of_an_earlier_version_are_compared_as_such(folder: Path) -> None:
    value = change_log(folder, 5, "train/loss", 0.0)
    assert value is not None
    change_log(folder, 5, "train/loss", float(f"{value:.7g}"))
    replay_run(folder, 5)


def test_a_number_that_was_not_finite_and_is_now_is_named(folder: Path) -> None:
    # The gradient was spoilt by hand, so that it is finite in the replay.
    with pytest.raises(VitaError, match=r"steps 3 to 4 were replayed; not as logged: 3$"):
        replay_run(folder, 4)


def test_a_rolled_back_run_is_replayed_as_it_ended(recipe: Recipe, tmp_path: Path) -> None:
    train_spoilt(recipe.replaced({"checkpoint.save": str(tmp_path / "run")}))
    shutil.rmtree(tmp_path / "run" / "step_00000004")
    replay_run(tmp_path / "run", 6)  # from step 2, over the packs that were left out


def test_a_step_is_replayed_with_the_recipe_of_its_time(folder: Path, recipe: Recipe) -> None:
    more = {"training.train_iters": 8, "optimizer.lr": 1e-3, "checkpoint.save": str(folder)}
    train(recipe.replaced(SKIPS | more))
    replay_run(folder, 6)
    replay_run(folder, 8)
    shutil.rmtree(folder / "step_00000006")
    with pytest.raises(ConfigError, match=r"steps 5 to 7, .* changed after step 6: replay a step"):
        replay_run(folder, 7)


def test_other_numbers_of_ranks_are_refused(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"ranks": 1', '"ranks": 2'))
    with pytest.raises(ConfigError, match=r"by 2 ranks, and these are 1: .*--nproc_per_node 2"):
        replay_run(folder, 6)


def test_a_rollback_takes_steps_of_other_numbers_of_ranks_back(folder: Path) -> None:
    rows = [{"event": "start", "step": 4, "ranks": 2}, {"event": "rollback", "step": 2}]
    rows += [{"event": "step", "step": step} for step in (3, 4)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    replayed = read_replayed(folder, 4)
    replayed.check(3, ranks=2)
    with pytest.raises(ConfigError, match="were done by 2 ranks, and these are 1"):
        replayed.check(3, ranks=1)


def test_what_was_not_logged_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--step is 7: .* has logged steps 1 to 6"):
        read_replayed(folder, 7)
    with pytest.raises(DataError, match="a run's folder is needed"):
        read_replayed(tmp_path, 1)


def test_the_command_ends_with_code_1_where_steps_differ(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # This process keeps its group and its log.
    monkeypatch.setattr(platform, "destroy_process_group", lambda: None)
    monkeypatch.setattr(platform, "set_up_logging", lambda rank: None)
    change_log(folder, 5, "train/loss", 1.0)
    assert main(["replay", str(folder), "--step", "1"]) == 0
    assert main(["replay", str(folder), "--step", "5"]) == 1
    assert caplog.messages[-1].endswith("not as logged: 5")
