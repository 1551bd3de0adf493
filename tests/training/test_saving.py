"""A save never stops a run and never costs the last good checkpoint; a damaged one is never loaded."""

import errno
import gc
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_vita.checkpoint import saver, store
from megatron_vita.checkpoint.reading import CheckedReader
from megatron_vita.checkpoint.writing import Share, WriterProcess, Written
from megatron_vita.config import load_recipe
from megatron_vita.errors import CheckpointError, SaveError
from megatron_vita.training.loop import train
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.run.run_state import open_saver, restore_newest, start_save
from tests.training.damage import DAMAGE, TENSORS, cut, flip

QUIET = ["data.num_workers=0", "training.eval_interval=0"]


@pytest.fixture(scope="module")
def run(recipe_path: Path) -> Run:
    """A run of eight steps, saved in the background after each fourth."""
    overrides = [*QUIET, "training.train_iters=8"]
    train(load_recipe(recipe_path, overrides))
    return open_run(load_recipe(recipe_path, overrides))


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run's checkpoints, which the run saves to meanwhile."""
    before = run.recipe
    shutil.copytree(before.checkpoint.save, tmp_path / "checkpoints")
    run.recipe = before.replaced({"checkpoint.save": str(tmp_path / "checkpoints")})
    yield tmp_path / "checkpoints"
    run.recipe = before


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.unwrapped_model.parameters()]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it_is_loaded(
    run: Run, folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage = DAMAGE[kind]
    damage(folder / "step_00000008" / name)
    resumed = restore_newest(run, ResumePoint.find(run.recipe))
    assert (run.step, run.consumed_packs) == (4, 16)
    assert resumed.checkpoint == folder / "step_00000004"
    assert "skipped" in caplog.text
    assert f"step_00000008/{name}".rstrip("/") in caplog.text


class _Command:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_an_index_that_would_run_code_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    path = folder / "step_00000008" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"], manifest["checksum"]  # as its maker can write them
    path.write_text(json.dumps(manifest))
    (path.parent / ".metadata").write_bytes(pickle.dumps(_Command(tmp_path / "ran")))
    resumed = restore_newest(run, ResumePoint.find(run.recipe))
    assert resumed.checkpoint == folder / "step_00000004"
    assert not (tmp_path / "ran").exists()


def test_an_object_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """torch's planner would unpickle anything that stands for an object among the tensors."""
    reader = CheckedReader(tmp_path, {})
    taken: list[object] = []

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            taken.append(torch.load(value, weights_only=False))

    def read(name: str, content: object) -> None:
        torch.save(content, tmp_path / name)
        size = (tmp_path / name).stat().st_size
        place = MetadataIndex(name)
        reader.storage_data[place] = _StorageInfo(name, offset=0, length=size)
        none = torch.Size([])
        item = ReadItem(LoadItemType.BYTE_IO, place, none, place, none, none)
        reader.read_data(LoadPlan([item]), Planner()).wait()

    read("harmless", {"step": 1})
    assert taken == [{"step": 1}]
    with pytest.raises(pickle.UnpicklingError):
        read("harmful", _Command(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    assert len(taken) == 1


def test_nothing_is_begun_anew_where_no_checkpoint_is_whole(run: Run, folder: Path) -> None:
    flip(folder / "step_00000004" / TENSORS, 0.5)
    cut(folder / "step_00000008" / TENSORS, 1)
    before = run.step
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*8/__0_0.*4/__0_0"):
        restore_newest(run, ResumePoint.find(run.recipe))
    assert run.step == before


def test_a_kill_before_the_first_latest_costs_nothing(run: Run, folder: Path) -> None:
    (folder / "latest").unlink()
    assert store.latest_checkpoint(folder) == folder / "step_00000008"


def test_a_checkpoint_without_checksums_is_taken_as_it_is(run: Run, folder: Path) -> None:
    path = folder / "step_00000008" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"], manifest["checksum"]
    path.write_text(json.dumps(manifest))
    restore_newest(run, ResumePoint.find(run.recipe))
    assert run.step == 8


def test_a_load_reads_a_checkpoint_once(run: Run, folder: Path) -> None:
    size = sum(path.stat().st_size for path in (folder / "step_00000008").rglob("*"))
    resume = ResumePoint.find(run.recipe)
    before = psutil.Process().io_counters().read_chars
    restore_newest(run, resume)
    assert psutil.Process().io_counters().read_chars - before < 1.2 * size


def test_what_is_saved_in_the_background_is_the_state_at_the_start(run: Run, folder: Path) -> None:
    restore_newest(run, ResumePoint.find(run.recipe))
    expected = weights(run)
    background = open_saver(run.recipe, in_background=True)
    run.step = 9
    start_save(run, background)
    with torch.no_grad():
        for p in run.unwrapped_model.parameters():
            p.add_(1)
    assert background.finish() == folder / "step_00000009"
    restore_newest(run, ResumePoint.find(run.recipe))
    assert run.step == 9
    for found, wanted in zip(weights(run), expected, strict=True):
        assert torch.equal(found, wanted)


def test_nothing_on_the_host_is_copied_while_training_waits_for_a_save(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    clone = torch.Tensor.clone

    def counted(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        copied.append(tensor.numel())
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("collects all garbage"))
    background = open_saver(run.recipe, in_background=True)
    run.step = 9
    start_save(run, background)
    monkeypatch.undo()
    assert sum(copied) < 100
    path = background.finish()
    # of each tensor its own elements alone
    size = (folder / "step_00000008" / TENSORS).stat().st_size
    assert (path / TENSORS).stat().st_size == pytest.approx(size, rel=0.02)


def test_a_writer_that_is_killed_costs_only_its_save(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Share, "write", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    background = open_saver(run.recipe, in_background=True)
    start_save(run, background)
    with pytest.raises(SaveError, match="writer process ended with code -9; nothing is left"):
        background.finish()
    assert not list(folder.glob(".step*"))
    assert store.latest_checkpoint(folder) == folder / "step_00000008"


def _write_for_ever(pipe: Any) -> None:
    writer = WriterProcess(lambda: time.sleep(60))
    pipe.send(writer._process.pid)
    time.sleep(60)


def test_a_writer_dies_with_its_rank() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    rank = context.Process(target=_write_for_ever, args=(theirs,))
    rank.start()
    writer = psutil.Process(ours.recv())
    rank.kill()
    rank.join()
    _, alive = psutil.wait_procs([writer], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_run_goes_on_while_its_store_is_down_and_saves_once_it_is_back(
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 4: nothing can be created; 5: a write fails; 8 and 9: the folder cannot be
    published."""
    write, begin, publish = Share.write, saver.Saver._begin, saver.publish
    calls = {"begin": 0, "write": 0, "publish": 0}

    def failing_begin(*args: Any, **keywords: Any) -> None:
        calls["begin"] += 1
        if calls["begin"] == 1:
            raise PermissionError(errno.EACCES, "Permission denied", "checkpoints")
        begin(*args, **keywords)

    def failing_write(self: Share) -> Written:
        calls["write"] += 1
        return Written(error="No space left on device") if calls["write"] == 1 else write(self)

    def failing_publish(*args: Any) -> None:
        calls["publish"] += 1
        if calls["publish"] in (2, 3):
            raise OSError(errno.EIO, "Input/output error")
        publish(*args)

    monkeypatch.setattr(saver.Saver, "_begin", failing_begin)
    monkeypatch.setattr(Share, "write", failing_write)
    monkeypatch.setattr(saver, "publish", failing_publish)
    monkeypatch.setattr("megatron_vita.training.callbacks.saving.LAST_PAUSES", (0.0, 0.0))
    overrides = ["checkpoint.async_save=false", "checkpoint.retry_steps=1"]
    folder = tmp_path / "saved"
    train(load_recipe(recipe_path, [*QUIET, f"checkpoint.save={folder}", *overrides]))
    log = (folder / "log.txt").read_text().splitlines()
    lines = [line.split(" ", 3)[3] for line in log if "not saved" in line or " saved /" in line]
    assert [line.split(":")[0].split(" in ")[0] for line in lines] == [
        "step 4", "step 5", f"saved {folder}/step_00000006", "step 8", "step 9",
        f"saved {folder}/step_00000010", f"saved {folder}/step_00000012",
    ]  # fmt: skip
    assert "Permission denied" in lines[0]
    assert "There is no checkpoint yet" in lines[0]
    assert "No space left on device; nothing is left of it. Training continues" in lines[1]
    assert "the next attempt is after step 9. The last checkpoint is step_00000006" in lines[3]
    assert store.latest_checkpoint(folder) == folder / "step_00000012"


def test_the_last_save_ends_a_run_that_cannot_do_it(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Share, "write", lambda self: Written(error="No space left on device"))
    monkeypatch.setattr("megatron_vita.training.callbacks.saving.LAST_PAUSES", (0.0,))
    where = [f"checkpoint.save={tmp_path / 'saved'}", "training.train_iters=1"]
    with pytest.raises(SaveError, match="No space left on device"):
        train(load_recipe(recipe_path, [*QUIET, *where]))


def test_a_watched_run_goes_through_and_leaves_no_process(
    recipe_path: Path, tmp_path: Path
) -> None:
    before = set(psutil.Process().children(recursive=True))
    where = [f"checkpoint.save={tmp_path / 'saved'}", "training.train_iters=2"]
    train(load_recipe(recipe_path, [*QUIET, *where, "training.hang_seconds=60"]))
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not (tmp_path / "saved" / "hangs").exists()
