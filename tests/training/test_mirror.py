"""Checkpoints are copied to an object store while a run goes on, and come back from there whole."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from megatron_vita import platform, stores
from megatron_vita.checkpoint import mirror as mirror_module
from megatron_vita.checkpoint import writing
from megatron_vita.checkpoint.claim import Claim
from megatron_vita.checkpoint.mirror import Mirror, Uploads
from megatron_vita.checkpoint.retention import Retention, note_scores
from megatron_vita.checkpoint.writing import Progress, WriterProcess, Written
from megatron_vita.config import load_recipe
from megatron_vita.errors import CallbackError, ConfigError, SaveError
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run, open_run
from tests.data.s3_server import FaultyStore
from tests.functional.toy_run import make_toy_run

RULE = Retention(last=2, every=30, best=1, metric="loss")


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0)


@pytest.fixture
def store(tmp_path: Path) -> Mirror:
    return Mirror(f"file://{tmp_path / 'store'}")


def put_checkpoint(folder: Path, step: int, *, loss: float = 1.0) -> Path:
    checkpoint = folder / f"step_{step:08d}"
    (checkpoint / "tokenizer").mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "manifest.json", "tokenizer/vocab.json"):
        (checkpoint / name).write_text(f"{name} of {step}")
    note_scores(checkpoint, {"loss": loss})
    return checkpoint


def contents(checkpoint: Path) -> dict[str, bytes]:
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in files}


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, calls: Iterator[bool]) -> None:
    """Let a method of the store fail where `calls` says so."""
    method = getattr(LocalFileSystem, name)

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if next(calls):
            raise ConnectionError("503 Slow Down")
        return method(*arguments, **keywords)

    monkeypatch.setattr(LocalFileSystem, name, failing)


def test_a_checkpoint_comes_back_as_it_was_from_a_store_that_fails_now_and_then(
    tmp_path: Path, store: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = put_checkpoint(tmp_path / "local", 10)
    for name in ("put_file", "get_file", "cat_file", "exists", "pipe_file"):
        fail_at(monkeypatch, name, itertools.cycle([True, False, False]))
    store.put(checkpoint)
    fetched = store.fetch(tmp_path / "new")
    assert fetched == tmp_path / "new" / "step_00000010"
    assert contents(fetched) == contents(checkpoint)
    assert (tmp_path / "new" / "latest").read_text() == "step_00000010"


@pytest.mark.parametrize("call", range(5))
def test_an_upload_that_breaks_off_anywhere_leaves_the_one_before_it_the_latest(
    tmp_path: Path, store: Mirror, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    store.put(put_checkpoint(tmp_path / "local", 10))
    later = put_checkpoint(tmp_path / "local", 20)
    fail_at(monkeypatch, "put_file", itertools.chain([False] * call, itertools.repeat(True)))
    with pytest.raises(OSError, match="503 Slow Down"):
        store.put(later)
    fetched = store.fetch(tmp_path / "new")
    assert fetched is not None
    assert fetched.name == "step_00000010"


def test_the_rules_of_retention_hold_in_the_store(tmp_path: Path, store: Mirror) -> None:
    for step, loss in ((10, 0.5), (20, 2.0), (30, 3.0), (40, 4.0), (50, 5.0), (60, 6.0)):
        store.put(put_checkpoint(tmp_path / "local", step, loss=loss))
    store.prune(RULE)
    kept = sorted(path.name for path in (tmp_path / "store").glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in (10, 30, 50, 60)]


def test_an_empty_store_has_nothing_to_fetch(tmp_path: Path, store: Mirror) -> None:
    assert store.fetch(tmp_path / "new") is None


def test_an_address_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror 'nowhere://a/b'"):
        Mirror("nowhere://a/b")


def store_is_down(*_: Any, **__: Any) -> Written:
    return Written(error="the store is down")


def wait_for(uploads: Uploads, step: int) -> None:
    """Poll until the upload under way has ended, and another has begun if one is due."""
    process = uploads._process
    assert process is not None
    while process.is_writing:
        time.sleep(0.01)
    uploads.poll(step)


def test_an_upload_that_fails_is_tried_again_and_the_newest_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "_upload", store_is_down)
    uploads = Uploads(f"file://{tmp_path / 'store'}", retention=RULE, retry_steps=10)
    first = put_checkpoint(tmp_path / "local", 10)
    uploads.add(first)
    uploads.poll(10)
    wait_for(uploads, 12)
    assert "step_00000010 is not uploaded" in caplog.text
    assert "the store is down; the next attempt is after step 22" in caplog.text
    uploads.poll(21)
    assert uploads._process is None
    monkeypatch.undo()
    uploads.add(put_checkpoint(tmp_path / "local", 20))
    uploads.poll(21)
    uploads.finish(21)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "latest", "step_00000020",
    ]  # fmt: skip


def test_the_last_upload_says_so_if_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_upload", store_is_down)
    uploads = Uploads(f"file://{tmp_path / 'store'}", retention=RULE, retry_steps=10)
    uploads.add(put_checkpoint(tmp_path / "local", 10))
    with pytest.raises(SaveError, match="step_00000010 cannot be uploaded: the store is down"):
        uploads.finish(10)


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyStore]:
    server = FaultyStore()
    with server.as_s3():
        fsspec.filesystem("s3").mkdir("runs")
        yield server
    server.close()


def test_a_store_that_is_down_is_tried_again_and_then_has_the_checkpoint(
    tmp_path: Path, s3: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = put_checkpoint(tmp_path / "local", 10)
    uploads = Uploads("s3://runs/one", retention=RULE, retry_steps=2)
    s3.is_down = True
    uploads.add(checkpoint)
    uploads.poll(10)
    wait_for(uploads, 11)
    s3.is_down = False
    assert "step_00000010 is not uploaded to s3://runs/one" in caplog.text
    assert "the next attempt is after step 13" in caplog.text
    uploads.poll(13)
    uploads.finish(13)
    fetched = Mirror("s3://runs/one").fetch(tmp_path / "new")
    assert fetched is not None
    assert contents(fetched) == contents(checkpoint)


def test_the_parts_of_an_upload_that_was_killed_are_removed_and_no_others(
    tmp_path: Path, s3: FaultyStore
) -> None:
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    for key in ("two/step_00000010/__0_0.distcp", "two/other.tar", "twos/step_00000010/a"):
        files.call_s3("create_multipart_upload", Bucket="runs", Key=key)
    Mirror("s3://runs/two").put(put_checkpoint(tmp_path / "local", 20))
    left = sorted(upload["Key"] for upload in files.list_multipart_uploads("runs"))
    assert left == ["two/other.tar", "twos/step_00000010/a"]


def test_an_upload_notes_its_progress_file_by_file(tmp_path: Path, store: Mirror) -> None:
    noted: list[None] = []
    store.put(put_checkpoint(tmp_path / "local", 10), note_progress=lambda: noted.append(None))
    assert len(noted) >= 5


def test_a_wait_for_a_process_that_goes_on_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PROGRESS_SECONDS", 0.02)
    progress = Progress()

    def write() -> Written:
        for _ in range(10):
            time.sleep(0.05)
            progress.note()
        time.sleep(0.3)
        return Written()

    noted: list[float] = []
    process = WriterProcess(write, progress=progress)
    process.result(lambda: noted.append(time.monotonic()))
    assert 3 <= len(noted) <= 10
    # none while it does nothing
    assert time.monotonic() - noted[-1] > 0.2


def test_a_run_whose_disk_is_lost_goes_on_from_the_store(tmp_path: Path) -> None:
    platform.initialize_process()
    overrides = [
        "data.num_workers=0", "training.eval_interval=0", "training.train_iters=4",
        "checkpoint.save_interval=2", f"checkpoint.mirror=file://{tmp_path / 'store'}",
    ]  # fmt: skip
    recipe = load_recipe(make_toy_run(tmp_path), overrides)
    train(recipe)
    folder = Path(recipe.checkpoint.save)
    expected = contents(folder / "step_00000004")
    shutil.rmtree(folder)
    run = open_run(recipe)
    assert run.step == 4
    found = contents(folder / "step_00000004")
    assert {name: found[name] for name in expected} == expected


class AtLastStep(Callback):
    """Keeps the run, and may fail after its only step."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.run: Run | None = None

    def on_start(self, run: Run) -> None:
        self.run = run

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if self.fails:
            raise ValueError("no more")


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_upload_is_watched_for_hangs(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    watched: list[bool] = []
    callback = AtLastStep(fails=fails)
    finish = Uploads.finish

    def noting(uploads: Uploads, step: int) -> None:
        watched.append(callback.run.beacon is not None)
        finish(uploads, step)

    monkeypatch.setattr(Uploads, "finish", noting)
    recipe = load_recipe(recipe_path, [*one_step(tmp_path), "training.hang_seconds=60"])
    ending: Any = nullcontext()
    if fails:
        ending = pytest.raises(CallbackError, match="no more")
    with ending:
        train(recipe, callbacks=[callback])
    assert watched == [True]
    assert callback.run.beacon is None
    assert (tmp_path / "store" / "latest").read_text() == "step_00000001"


def test_a_run_whose_last_upload_fails_is_recorded_as_failed(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_upload", store_is_down)
    with pytest.raises(SaveError, match="cannot be uploaded: the store is down"):
        train(load_recipe(recipe_path, one_step(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["event"] for row in rows] == ["start", "step", "save", "error"]
    assert "cannot be uploaded" in rows[-1]["error"]


def one_step(folder: Path) -> list[str]:
    """Overrides for a run of one step, whose checkpoint is uploaded."""
    return [
        *("data.num_workers=0", "training.eval_interval=0", "training.train_iters=1"),
        *(f"checkpoint.save={folder / 'run'}", f"checkpoint.mirror=file://{folder / 'store'}"),
    ]


def test_a_job_that_has_lost_its_claim_changes_nothing_in_the_store(
    store: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim = Claim(tmp_path / "run")
    claim.take()
    uploads = Uploads(store.url, retention=RULE, retry_steps=10, claim=claim)
    uploads.add(put_checkpoint(tmp_path / "run", 10))
    uploads.finish(10)
    Claim(tmp_path / "run").take()
    uploads.add(put_checkpoint(tmp_path / "run", 20))
    with pytest.raises(SaveError, match="another job saves here since"):
        uploads.finish(20)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "latest",
        "step_00000010",
    ]
