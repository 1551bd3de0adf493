"""Checks of `checkpoint.save` before the first step: writable, shared by all ranks, large enough."""

import os
from pathlib import Path

import pytest

from megatron_vita.checkpoint import shared_folder, space
from megatron_vita.config import load_recipe
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.errors import (
    CheckpointError,
)
from megatron_vita.training.run.run import open_run
from tests.functional.toy_run import QUICK

FAST = [*QUICK, "training.train_iters=2"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    recipe_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"checkpoint.save .*/file/checkpoints: cannot be written"
    ):
        open_run(
            load_recipe(
                recipe_path, [*FAST, f"checkpoint.save={tmp_path / 'file' / 'checkpoints'}"]
            )
        )


@pytest.mark.parametrize(
    ("probe", "newest", "problem"),
    [
        ("absent", "", "is not the folder that the first rank has"),
        (
            "probe",
            "step_00000008",
            "the newest checkpoint is none, and step_00000008 for the first rank",
        ),
        ("probe", "", ""),
    ],
)
def test_a_folder_that_differs_from_the_first_ranks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str, newest: str, problem: str
) -> None:
    monkeypatch.setattr(shared_folder, "VISIBLE_SECONDS", 0.1)
    (tmp_path / "probe").touch()
    found = shared_folder._look_for(tmp_path, probe, newest)
    assert (problem in found) if problem else not found
    assert [file.name for file in tmp_path.iterdir()] == ["probe"]


def test_a_disk_without_room_for_a_checkpoint_is_refused_with_bytes_needed_and_free(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_path, [*FAST, f"checkpoint.save={tmp_path}"])
    needed = checkpoint_bytes(recipe)
    monkeypatch.setattr(space, "free_bytes", lambda _: needed - 1)
    with pytest.raises(
        CheckpointError,
        match=rf"checkpoint.save {tmp_path}: no space .* \({needed} bytes\), and .* \({needed - 1} bytes\) are free",
    ):
        open_run(recipe)
    assert list(tmp_path.iterdir()) == []


def test_room_for_fewer_checkpoints_than_are_kept_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _: 2500)
    (tmp_path / "step_00000004").mkdir()
    shared_folder.check_shared(tmp_path, size=1000, count=3)
    assert not caplog.text
    shared_folder.check_shared(tmp_path, size=1000, count=4)
    assert "will be full: 4 checkpoints" in caplog.text
    assert "need 3.0 kB more, and 2.5 kB are free" in caplog.text


def test_halves_of_killed_saves_count_as_room(tmp_path: Path) -> None:
    (tmp_path / ".step_00000004.incomplete").mkdir()
    free = space.room_in(tmp_path)
    (tmp_path / ".step_00000004.incomplete" / "half").write_bytes(bytes(1 << 20))
    assert abs(space.room_in(tmp_path) - free) < 1 << 19 or os.environ.get("PYTEST_XDIST_WORKER")


def test_a_rank_that_cannot_write_there_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shared_folder, "VISIBLE_SECONDS", 0.1)
    (tmp_path / "probe").touch()
    monkeypatch.setattr(Path, "touch", refuse)
    assert "Permission denied" in shared_folder._look_for(tmp_path, "probe", "")


def test_a_latest_checkpoint_that_cannot_be_read_is_no_matter_of_writing_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match=rf"checkpoint.save {tmp_path}: .*latest"):
        shared_folder.check_shared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_folder_is_left_as_it_was_found(tmp_path: Path) -> None:
    shared_folder.check_shared(tmp_path / "new" / "checkpoints")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
