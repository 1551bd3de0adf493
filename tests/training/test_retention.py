"""Checkpoints that are kept, and those that are removed."""

import json
from pathlib import Path

import pytest

from megatron_vita.checkpoint import retention
from megatron_vita.checkpoint.retention import Retention, note_scores
from megatron_vita.config import load_recipe
from megatron_vita.errors import (
    ConfigError,
)
from megatron_vita.training.loop import train


def put_checkpoint(folder: Path, name: str) -> None:
    """A folder that counts as a complete checkpoint."""
    (folder / name).mkdir()
    (folder / name / "manifest.json").touch()


def test_a_checkpoint_just_saved_is_kept_when_later_ones_exist(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        put_checkpoint(tmp_path, f"step_{step:08d}")
    Retention(last=1).prune(tmp_path, newest=tmp_path / "step_00000004")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step_{step:08d}" for step in (4, 6, 8)
    ]


def test_only_what_was_saved_under_its_own_name_is_removed(tmp_path: Path) -> None:
    others = ["step_00000002_best", "step_00000002.tar", "best"]
    for name in ("step_00000002", "step_00000004", "step_00000006", *others):
        put_checkpoint(tmp_path, name)
    (tmp_path / "step_00000003").symlink_to("best")
    Retention(last=2).prune(tmp_path, newest=tmp_path / "step_00000006")
    left = ["step_00000003", "step_00000004", "step_00000006", *others]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing_and_is_no_checkpoint_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError("device or resource busy")

    for step in (2, 4):
        put_checkpoint(tmp_path, f"step_{step:08d}")
    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", busy)
        Retention(last=1).prune(tmp_path, newest=tmp_path / "step_00000004")
    assert "step_00000002: cannot be removed: device or resource busy" in caplog.text
    assert not (tmp_path / "step_00000002").exists()


def put_checkpoints(folder: Path, scores: dict[int, float | None]) -> None:
    for step, score in scores.items():
        checkpoint = folder / f"step_{step:08d}"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").touch()
        if score is not None:
            note_scores(checkpoint, {"validation/loss": score})


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Retention(last=2), [50, 60]),
        (Retention(last=1, every=20), [20, 40, 60]),
        (Retention(last=1, best=2, metric="validation/loss"), [20, 50, 60]),
        (Retention(last=1, best=1, metric="validation/loss", mode="max"), [10, 60]),
        (Retention(last=1, every=30, best=1, metric="validation/loss"), [20, 30, 60]),
        (Retention(last=1, best=3, metric="train/loss"), [60]),
    ],
)
def test_a_checkpoint_is_kept_if_any_rule_names_it(
    tmp_path: Path, rule: Retention, kept: list[int]
) -> None:
    put_checkpoints(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.5, 60: None})
    rule.prune(tmp_path, newest=tmp_path / "step_00000060")
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == kept


def test_a_folder_without_a_manifest_is_not_among_the_last_ones(tmp_path: Path) -> None:
    put_checkpoints(tmp_path, {10: None, 20: None, 30: None})
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    Retention(last=2).prune(tmp_path, newest=tmp_path / "step_00000030")
    assert (tmp_path / "step_00000010").exists()


def test_a_validation_after_a_save_scores_its_checkpoint(recipe_path: Path, tmp_path: Path) -> None:
    overrides = [
        "training.eval_interval=2", "training.train_iters=4", "data.num_workers=0",
        "checkpoint.save_interval=2", "checkpoint.keep_best=1", f"checkpoint.save={tmp_path}",
    ]  # fmt: skip
    train(load_recipe(recipe_path, overrides))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    losses = {row["step"]: row["validation/loss"] for row in rows if row["event"] == "validation"}
    for step, loss in losses.items():
        scores = json.loads((tmp_path / f"step_{step:08d}" / "scores.json").read_text())
        assert scores["validation/loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.keep_best=2", "training.eval_interval=0"], "needs training.eval_interval"),
        (["checkpoint.mirror=s3://b/run", "checkpoint.save=''"], "needs checkpoint.save"),
        (["checkpoint.keep_every=5", "checkpoint.save=''"], "needs checkpoint.save"),
        (["checkpoint.retry_steps=0"], "must be at least 1"),
        (["checkpoint.keep_best=-1"], "must be at least 0"),
        (["checkpoint.best_mode=best"], "best_mode"),
    ],
)
def test_rules_that_could_not_hold_are_refused(
    recipe_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_path, overrides)
