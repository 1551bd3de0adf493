"""A run's folder holds what it was and did, over all of its starts."""

import dataclasses
import io
import itertools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import wandb
from mlflow import MlflowClient
from wandb.proto import wandb_internal_pb2

from megatron_vita.config import TrainingConfig, load_recipe
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.errors import CallbackError, ConfigError, PlatformError
from megatron_vita.report.__main__ import main as report
from megatron_vita.report.reading import read_run
from megatron_vita.sizes import readable_bytes
from megatron_vita.training.callbacks import Callback, optional
from megatron_vita.training.callbacks.console import LogCallback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics import environment, pace
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_folder import RunLog, note_start, take_back_recipes
from tests.functional.toy_run import QUICK


class FailsAt(Callback):
    """Fails once a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, run: Run, metrics: Any) -> None:
        if run.step == self.step:
            raise RuntimeError("the machine is gone")


@pytest.fixture(scope="module")
def restarted(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that failed after step 3, tore a line, and went on from step 2 with
    another learning rate."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    fields = [
        "data.num_workers=0",
        "training.train_iters=4",
        "training.eval_interval=2",
        f"checkpoint.save={folder}",
        "checkpoint.save_interval=2",
        "checkpoint.async_save=false",  # in the background a save ends after a later step
    ]
    with pytest.raises(CallbackError):
        train(load_recipe(recipe_path, fields), callbacks=[FailsAt(3)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 4, "ti')
    train(load_recipe(recipe_path, [*fields, "optimizer.lr=1e-3"]))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_events_and_metrics_of_all_starts_are_whole_lines_in_order(restarted: Path) -> None:
    rows = rows_of(restarted)
    assert [(row["event"], row["step"]) for row in rows] == [
        *(("start", 0), ("step", 1), ("step", 2), ("save", 2), ("validation", 2), ("step", 3)),
        *(("error", 3), ("start", 2), ("step", 3), ("step", 4), ("save", 4), ("validation", 4)),
        ("end", 4),
    ]
    assert "the machine is gone" in rows[6]["error"]
    assert rows[1]["train/loss"] > 0
    assert rows[4].keys() == {"event", "step", "time", "validation/loss", "validation/loss/held"}
    assert all(
        0 <= after["time"] - before["time"] < 600 for before, after in itertools.pairwise(rows)
    )
    assert len({row["time"] for row in rows}) > len(rows) / 2  # neighbours may share a millisecond
    assert rows[-1]["time"] == pytest.approx((restarted / "metrics.jsonl").stat().st_mtime, abs=60)


def test_a_reader_takes_the_last_of_steps_that_were_repeated(restarted: Path) -> None:
    record = read_run(restarted)
    rows = rows_of(restarted)
    assert list(record.steps) == [1, 2, 3, 4]
    assert record.steps[3] == rows[8] != rows[5]
    assert list(record.validations) == [2, 4]
    first, second = record.segments
    assert (first.start, first.last, first.repeated, first.end) == (0, 3, 1, "error")
    assert (second.start, second.last, second.repeated, second.end) == (2, 4, 0, "done")
    assert len(record.environment) == 2
    assert record.total_steps == 4


def test_a_run_killed_without_a_word_and_one_that_goes_on_are_read(tmp_path: Path) -> None:
    lines = [
        '{"event": "start", "step": 0, "time": 1.0}',
        '{"event": "step", "step": 1, "time": 2.0, "train/loss": 5.0}',
        '{"event": "step", "st',
        '{"event": "start", "step": 0, "time": 9.0}',
        '{"event": "step", "step": 1, "time": 11.0, "train/loss": null}',
        '{"event": "step", "step": 2, "time": 12.0, "train/loss": 3.0}',
        '{"event": "ste',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    record = read_run(tmp_path)
    assert record.series("train/loss") == [(2, 3.0)]
    assert [segment.end for segment in record.segments] == ["killed", "killed"]
    assert record.segments[0].repeated == 1


def test_the_recipe_of_each_start_is_kept_and_can_be_run_again(restarted: Path) -> None:
    now = load_recipe(restarted / "recipe.yaml")
    before = load_recipe(restarted / "recipe_until_step_00000002.yaml")
    assert (before.optimizer.lr, now.optimizer.lr) == (3e-3, 1e-3)
    assert dataclasses.replace(before, optimizer=now.optimizer) == now


def test_log_and_environment_are_added_to_by_each_start(restarted: Path) -> None:
    log = (restarted / "log.txt").read_text()
    for part in ("step 3/4", "resumed from", "resumed with changes: optimizer.lr", "plan: "):
        assert part in log
    assert log.count("step 1/4") == 1
    assert "RuntimeError: the machine is gone" in log  # with its traceback
    first, second = map(json.loads, (restarted / "environment.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 2)
    assert first["packages"]["megatron-core"] == "0.19.2"
    assert {"host", "commit", "command", "folder", "ranks", "python"} < first.keys()


def test_the_folder_may_be_another_than_that_of_checkpoints(
    recipe_path: Path, tmp_path: Path
) -> None:
    fields = [*QUICK, "training.train_iters=1", f"training.run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, fields))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("environment.jsonl", "log.txt", "metrics.jsonl", "recipe.yaml")
    ]
    (tmp_path / "file").touch()
    fields[-1] = f"training.run_dir={tmp_path / 'file' / 'run'}"
    line = r"FolderCallback.on_start, .*/file/run: the run's folder cannot be written: Not a dir"
    with pytest.raises(CallbackError, match=line):
        train(load_recipe(recipe_path, fields))


def test_lines_from_before_the_folder_is_known_are_in_its_log(tmp_path: Path) -> None:
    found = logging.getLogger("test_run_folder")
    found.setLevel(logging.INFO)
    with RunLog(0) as first, RunLog(3) as other:
        found.info("early")
        first.open(tmp_path)
        other.open(tmp_path)
        found.info("late")
        assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
        found.warning("odd")
    found.warning("after the end")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO early", "INFO late", "WARNING odd"]
    assert (tmp_path / "log_rank_00003.txt").read_text().endswith("WARNING odd\n")


def test_time_left_counts_saving_and_validation_and_forgets_warm_up(
    monkeypatch: pytest.MonkeyPatch, recipe_path: Path
) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    fields = ["training.train_iters=25", "training.eval_interval=10", "checkpoint.save_interval=5"]
    clock = pace.Pace(load_recipe(recipe_path, fields))

    def spend(part: pace.Part, seconds: float) -> None:
        nonlocal now
        now += seconds
        clock.mark(part)

    spend("step", 100.0)
    assert clock.left(1) == pytest.approx(24 * 100)
    for _ in range(3):
        spend("rest", 0.5)
        spend("step", 2.0)
    assert clock.left(4) == pytest.approx(21 * 2.5)
    spend("step", 2.5)
    spend("save", 7.0)
    spend("rest", 0.0)
    # saving after steps 10, 15, 20 and 25
    assert clock.left(6) == pytest.approx(19 * 2.5 + 4 * 7)
    spend("validation", 30.0)
    # validation after steps 10, 20 and 25, the first still to come
    assert clock.left(10) == pytest.approx(15 * 2.5 + 4 * 7 + 3 * 30)
    assert clock.left(25) == pytest.approx(7 + 30)
    assert pace.clock(3723.9) == "1:02:03"


def test_time_left_counts_no_rollback(monkeypatch: pytest.MonkeyPatch, recipe_path: Path) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    fields = ["training.train_iters=25", "training.eval_interval=0"]
    clock = pace.Pace(load_recipe(recipe_path, fields))
    callback = LogCallback(clock)
    run = cast(Run, None)
    for _ in range(3):
        now += 2.0
        clock.mark("step")
    now += 1.0
    callback.before_step(run)
    now += 500.0  # the faulty step, and the restore
    callback.on_rollback(run, 4)
    callback.before_step(run)
    now += 2.0
    clock.mark("step")
    assert clock.left(3) == pytest.approx(22 * 2.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_a_file_shows_lines(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for kind in (Terminal, io.StringIO):
        stream = kind()
        monkeypatch.setattr(sys, "stderr", stream)
        folder = tmp_path / kind.__name__
        fields = [*QUICK, "training.train_iters=3", f"training.run_dir={folder}"]
        train(load_recipe(recipe_path, [*fields, "training.eval_interval=3"]))
        shown[kind] = stream.getvalue()
        assert (folder / "log.txt").read_text().count("grad norm") == 3
    assert "step 3/3 | loss " in shown[Terminal]
    assert "grad norm" not in shown[Terminal]
    assert "validation at step 3" in shown[Terminal]
    assert shown[io.StringIO].count("grad norm") == 3
    assert "\r" not in shown[io.StringIO]


def test_a_run_begins_with_its_plan_and_the_places_where_it_logs(restarted: Path) -> None:
    log = (restarted / "log.txt").read_text()
    (record,) = {line for line in log.splitlines() if "steps 3 to 4 take packs 9 to 16" in line}
    assert "packs of 256 tokens in 4 epochs" in record
    assert f"logs: folder {restarted}" in log
    size = readable_bytes(checkpoint_bytes(load_recipe(restarted / "recipe.yaml")))
    assert log.count(f"checkpoints: about {size} each, every 2 steps; 2 are kept") == 2
    for part in ("reading the plan", "building the model", "reading the first packs"):
        assert log.count(part) == 2


def test_a_commit_is_told_of_a_checkout_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages" / "megatron_vita"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    environment._git(tmp_path, "init", "--quiet")
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    environment._git(tmp_path, *who, "commit", "--quiet", "--allow-empty", "--message=x")
    monkeypatch.setattr(environment.megatron_vita, "__file__", str(folder / "__init__.py"))
    assert environment.find_commit() == ""
    environment._git(tmp_path, "add", "--all")
    commit = environment._git(tmp_path, "rev-parse", "HEAD")[:12]
    assert environment.find_commit() == f"{commit}-dirty"


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, after W&B's header of 7 bytes: blocks of 32 KiB,
    pieces with checksum (4 bytes), length (2) and kind (whole, first, middle, last)."""
    place = 7
    record = b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(folder: Path) -> tuple[str, list[dict[str, float]]]:
    """Id and history of an offline run's file."""
    (path,) = folder.glob("run-*.wandb")
    history = []
    run_id = ""
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.HasField("run"):
            run_id = record.run.run_id
        if record.HasField("history"):
            items = record.history.item
            history.append(
                {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in items
                }
            )
    return run_id, history


def test_wandb_and_mlflow_get_all_metrics_and_one_run_over_restarts(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    waited: list[bool] = []
    log_batch = MlflowClient.log_batch

    def noted(*arguments: Any, **keywords: Any) -> Any:
        waited.append(keywords["synchronous"])
        return log_batch(*arguments, **keywords)

    monkeypatch.setattr(MlflowClient, "log_batch", noted)
    fields = [
        "data.num_workers=0", "training.eval_interval=2", "checkpoint.save_interval=2",
        f"checkpoint.save={tmp_path / 'run'}", "training.wandb_project=vita",
        "training.mlflow_experiment=vita", f"training.mlflow_tracking_uri={tmp_path / 'mlruns'}",
    ]  # fmt: skip
    recipe = load_recipe(recipe_path, [*fields, "training.train_iters=4"])
    with pytest.raises(CallbackError):
        train(recipe, callbacks=[FailsAt(3)])
    train(recipe)
    wandb.teardown()
    runs = [read_wandb(path) for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))]
    assert [[row["step"] for row in history] for _, history in runs] == [[1, 2, 2, 3], [3, 4, 4]]
    assert len({run_id for run_id, _ in runs}) == 1
    written = read_run(tmp_path / "run")
    assert runs[1][1][0]["train/loss"] == pytest.approx(written.steps[3]["train/loss"], rel=1e-6)
    client = MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("vita").experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(loss.step for loss in losses) == [1, 2, 3, 3, 4]
    held_out = client.get_metric_history(run.info.run_id, "validation/loss.held")
    assert [loss.step for loss in held_out] == [2, 4]
    assert waited
    assert not any(waited)  # no step waits for files or a server


@pytest.mark.parametrize(
    ("field", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow-skinny")]
)
def test_a_package_that_is_not_installed_is_named_before_anything_is_built(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, package: str
) -> None:
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda _: None)
    recipe = load_recipe(recipe_path, [*QUICK, f"training.{field}=vita", "text.tokenizer=nowhere"])
    with pytest.raises(PlatformError, match=rf"training.{field} is 'vita', .* install {package}$"):
        train(recipe)


@pytest.mark.parametrize("field", ["wandb_exp_name", "mlflow_run_name", "mlflow_tracking_uri"])
def test_a_setting_of_what_is_not_asked_for_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{field} is 'x', which needs training."):
        TrainingConfig(**cast(Any, {field: "x"}))


def test_a_start_says_what_it_does_before_anything_heavy_is_imported(recipe_path: Path) -> None:
    program = """
import sys
class Told:
    def write(self, text):
        sys.stdout.write(f"{'torch' in sys.modules} {text}")
        sys.stdout.flush()
        sys.exit(7)
sys.stderr = Told()
from megatron_vita.cli.train import main
main([sys.argv[1]], name="train")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(recipe_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    line = (
        rf"False \d\d:\d\d:\d\d INFO training {recipe_path}: importing PyTorch and megatron-core\n"
    )
    assert re.fullmatch(line, ended.stdout)


def test_the_page_of_a_run_shows_packs_that_it_has_seen(restarted: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert report([str(restarted), "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 4
    for step, pack in ((1, 1), (2, 5), (3, 9), (4, 13)):  # four packs a step
        assert f"step {step}, pack {pack}<" in page
    assert "error: callback " in page


def test_recipes_of_steps_that_are_taken_back_end_there(recipe_path: Path, tmp_path: Path) -> None:
    def recipes() -> dict[str, float]:
        return {path.stem: load_recipe(path).optimizer.lr for path in tmp_path.glob("*.yaml")}

    def start(lr: float, *, step: int) -> None:
        recipe = load_recipe(recipe_path, [*QUICK, f"optimizer.lr={lr}"])
        note_start(tmp_path, recipe, step=step, environment={})

    start(1.0, step=0)
    start(2.0, step=4)
    start(3.0, step=2)
    until = "recipe_until_step_0000000"
    assert recipes() == {f"{until}2": 1.0, "recipe": 3.0}
    start(4.0, step=6)
    start(4.0, step=5)
    assert recipes() == {f"{until}2": 1.0, f"{until}5": 3.0, "recipe": 4.0}
    take_back_recipes(tmp_path, 4)  # by a rollback
    assert recipes() == {f"{until}2": 1.0, f"{until}4": 3.0, "recipe": 4.0}
    start(5.0, step=2)
    assert recipes() == {f"{until}2": 1.0, "recipe": 5.0}
