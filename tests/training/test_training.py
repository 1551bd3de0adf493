"""Results, reports and errors of a training run."""

import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vita import platform
from megatron_vita.checkpoint import retention, shared_folder, space, store
from megatron_vita.checkpoint.retention import Retention
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.costs.checkpoint_size import checkpoint_bytes
from megatron_vita.data.batch import Batch
from megatron_vita.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    DataError,
    StoppedError,
    VitaError,
)
from megatron_vita.training import loop, stop_signal
from megatron_vita.training.callbacks import validation
from megatron_vita.training.callbacks.tensorboard import TensorBoardCallback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics import StepMetrics
from megatron_vita.training.run import Run, open_run
from megatron_vita.training.step import train_step
from tests.functional.toy_run import data_tools, make_toy_run

PARTS = ("vision_model", "projector", "language_model")
NO_RUN = cast(Run, None)
FAST = [
    "data.num_workers=0",
    "training.eval_interval=0",
    "checkpoint.save=''",
    "training.train_iters=2",
]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    platform.initialize_process()
    return make_toy_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def trained(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run of twelve steps with checkpoints, validation and TensorBoard."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(
        recipe_path,
        [
            f"checkpoint.save={folder / 'checkpoints'}",
            f"training.tensorboard_dir={folder / 'tensorboard'}",
        ],
    )
    train(recipe)
    return recipe


def test_each_frozen_part_keeps_its_weights_and_the_others_move(recipe_path: Path) -> None:
    for frozen in PARTS:
        run = None

        def keep(recipe: Recipe) -> object:
            nonlocal run
            run = open_run(recipe)
            return run

        recipe = load_recipe(recipe_path, [*FAST, f"training.freeze_{frozen}=true"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "open_run", keep)
            before = {
                name: p.clone() for name, p in open_run(recipe).unwrapped_model.named_parameters()
            }
            train(recipe)
        for name, parameter in run.unwrapped_model.named_parameters():
            assert torch.equal(before[name], parameter) == name.startswith(frozen), name


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


def test_a_checkpoint_that_is_due_is_saved_before_validation_can_fail(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise DataError("a held-out shard is gone")

    monkeypatch.setattr(validation, "validation_batches", fail)
    with pytest.raises(DataError, match="held-out"):
        train(
            load_recipe(
                recipe_path, [*FAST, "training.eval_interval=2", f"checkpoint.save={tmp_path}"]
            )
        )
    assert (tmp_path / "latest").read_text() == "step_00000002"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_after_its_step_and_says_so(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def told(run: Run, batches: Iterator[Batch]) -> StepMetrics:
        if run.step == 1:
            for _ in range(2):  # a launcher and a supervisor
                os.kill(os.getpid(), number)
        return train_step(run, batches)

    monkeypatch.setenv(stop_signal.LAUNCHED, "torchrun")
    monkeypatch.setattr(loop, "train_step", told)
    monkeypatch.setattr(
        validation, "validation_batches", lambda _: pytest.fail("there is no time for it")
    )
    before = signal.getsignal(number)
    fields = ["training.train_iters=4", "training.eval_interval=2", f"checkpoint.save={tmp_path}"]
    with pytest.raises(
        StoppedError, match=rf"told to stop \({number.name}\) after step 2 of 4: saved"
    ):
        train(load_recipe(recipe_path, [*FAST, *fields]))
    assert (tmp_path / "latest").read_text() == "step_00000002"
    assert signal.getsignal(number) == before


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


def test_a_run_is_killed_by_a_signal_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    monkeypatch.setattr(stop_signal, "REPEAT_SECONDS", 0.05)
    with stop_signal.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.received, raised) == ("SIGUSR1", [])
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM]


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    monkeypatch.delenv(stop_signal.LAUNCHED, raising=False)
    if launched:
        monkeypatch.setenv(stop_signal.LAUNCHED, "torchrun")
    with stop_signal.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        if launched:  # torchrun passes on what the terminal sent to all
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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


def test_scalars_that_were_written_after_the_checkpoint_go_and_the_last_are_there_at_once(
    tmp_path: Path,
) -> None:
    def steps_shown() -> list[int]:
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return [event.step for event in events.Scalars("validation/loss")]

    first = TensorBoardCallback(str(tmp_path), step=0)
    for step in (2, 4, 6):
        first.on_log(NO_RUN, metrics_of(step))
    assert steps_shown() == [2, 4, 6]
    again = TensorBoardCallback(str(tmp_path), step=4)
    again.on_log(NO_RUN, metrics_of(8))
    assert steps_shown() == [2, 4, 8]


def metrics_of(step: int) -> StepMetrics:
    counts: dict[str, Any] = {
        "loss_tokens": 1,
        "tokens": 1,
        "tiles": 0,
        "documents": 1,
        "damaged": 0,
    }
    return StepMetrics(
        step=step, loss=1.0, source_losses={}, fill=1.0, seconds=1.0, held_out=True, **counts
    )


def test_a_text_only_run_trains_on_what_has_no_media_and_may_start_from_a_whole_model(
    recipe_path: Path, trained: Recipe, tmp_path: Path
) -> None:
    text_only = ["model.text_only=true", f"data.plan={tmp_path / 'plan'}", "data.epochs=8"]
    data_tools("plan", recipe_path, *text_only)
    rejected = (tmp_path / "plan" / "rejected.jsonl").read_text().splitlines()
    # of training and held-out data, two of three samples have an image
    assert len(rejected) == 2 * 60
    assert "has images or videos (" in rejected[0]
    recipe = load_recipe(
        recipe_path, [*FAST, *text_only, f"checkpoint.load={trained.checkpoint.save}"]
    )
    run = open_run(recipe)
    assert {name.split(".")[0] for name, _ in run.unwrapped_model.named_parameters()} == {
        "language_model"
    }
    whole = open_run(
        load_recipe(recipe_path, [f"checkpoint.save={trained.checkpoint.save}"])
    ).unwrapped_model
    for name, parameter in run.unwrapped_model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    train(recipe)


def test_learning_rate_rises_linearly_and_falls_by_a_cosine(recipe_path: Path) -> None:
    recipe = load_recipe(
        recipe_path,
        [
            *FAST,
            "training.train_iters=10",
            "optimizer.lr_warmup_fraction=0.2",
            "optimizer.min_lr=1e-4",
        ],
    )
    run = open_run(recipe)
    rates = []
    for _ in range(10):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.schedule.step(1)
    peak = recipe.optimizer.lr
    low = recipe.optimizer.min_lr
    cosine = [
        low + (peak - low) * (1 + math.cos(math.pi * (step - 2) / 8)) / 2 for step in range(2, 10)
    ]
    assert rates == pytest.approx([0.0, peak / 2, *cosine])


def test_the_vision_towers_rate_falls_from_its_last_layer_to_its_first(recipe_path: Path) -> None:
    overrides = [
        *FAST,
        "optimizer.vision_lr_mult=0.1",
        "optimizer.vision_lr_decay=0.9",
        "model.vision.num_layers=3",
    ]
    run = open_run(
        load_recipe(
            recipe_path, [*overrides, "training.train_iters=10", "optimizer.lr_warmup_fraction=0.1"]
        )
    )
    run.schedule.step(1)
    rates: dict = {}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(round(group["lr"] / run.recipe.optimizer.lr, 6), 0)
            rates[round(group["lr"] / run.recipe.optimizer.lr, 6)] += parameter.numel()

    def size(part: str) -> int:
        return sum(
            p.numel() for name, p in run.unwrapped_model.named_parameters() if name.startswith(part)
        )

    depths = ["embeddings.", "layers.0.", "layers.1.", "layers.2."]
    expected = {
        round(0.1 * 0.9 ** (4 - i), 6): size(f"vision_model.{part}")
        for i, part in enumerate(depths)
    }
    assert rates == expected | {1.0: size("projector") + size("language_model")}


def test_vectors_and_biases_are_spared_weight_decay(recipe_path: Path) -> None:
    run = open_run(load_recipe(recipe_path, [*FAST, "optimizer.weight_decay=0.1"]))
    spared = sum(
        p.numel() for g in run.optimizer.param_groups if g["wd_mult"] == 0 for p in g["params"]
    )
    named = run.unwrapped_model.named_parameters()
    assert spared == sum(p.numel() for name, p in named if p.dim() == 1 or name.endswith("bias"))


def test_tensorboard_holds_losses_of_sources_and_of_held_out_packs(trained: Recipe) -> None:
    events = EventAccumulator(trained.training.tensorboard_dir)
    events.Reload()
    for tag in (
        "train/loss",
        "train/loss/colors",
        "train/grad_norm",
        "train/lr",
        "data/fill",
        "data/loss_tokens",
    ):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 13)), tag
    for tag in ("validation/loss", "validation/loss/held"):
        assert [event.step for event in events.Scalars(tag)] == [6, 12], tag
    first, last = events.Scalars("validation/loss")
    assert last.value < first.value
    fills = [event.value for event in events.Scalars("data/fill")]
    assert all(0.5 < fill <= 1 for fill in fills)


def test_the_newest_checkpoints_are_kept_and_latest_names_the_last(trained: Recipe) -> None:
    folder = Path(trained.checkpoint.save)
    assert sorted(path.name for path in folder.glob("*step*")) == ["step_00000008", "step_00000012"]
    newest = store.latest_checkpoint(folder)
    assert newest == folder / "step_00000012"
    manifest = store.read_manifest(newest)
    assert manifest["consumed_packs"] == 48
    assert manifest["recipe"] == dataclasses.asdict(trained)


def test_a_finished_run_has_nothing_to_do(trained: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("trained on"))
    train(trained)


def test_a_log_line_shows_all_that_is_promised(
    recipe_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr("megatron_vita.platform.set_up_logging", lambda _: None)
        train(load_recipe(recipe_path, FAST))
    (line,) = [
        record.getMessage() for record in caplog.records if "step 2/2" in record.getMessage()
    ]
    for part in ("loss", "grad norm", "lr", "tokens/s", "tiles/s", "loss tokens", "fill", "left"):
        assert part in line


def test_a_stage_starts_from_the_weights_of_another_run_at_step_0(
    trained: Recipe, recipe_path: Path
) -> None:
    run = open_run(load_recipe(recipe_path, [*FAST, f"checkpoint.load={trained.checkpoint.save}"]))
    assert (run.step, run.consumed_packs) == (0, 0)
    fresh = open_run(load_recipe(recipe_path, FAST))
    differ = [
        not torch.equal(p, q)
        for p, q in zip(
            run.unwrapped_model.parameters(), fresh.unwrapped_model.parameters(), strict=True
        )
    ]
    assert all(differ)


def test_a_checkpoint_of_another_model_is_refused_by_field(
    trained: Recipe, recipe_path: Path
) -> None:
    overrides = [*FAST, f"checkpoint.load={trained.checkpoint.save}", "model.language.num_layers=4"]
    with pytest.raises(
        CheckpointError, match=r"model.language.num_layers is 2 there and 4 in the recipe"
    ):
        open_run(load_recipe(recipe_path, overrides))


def test_a_missing_or_torn_checkpoint_is_refused_by_path(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        open_run(load_recipe(recipe_path, [*FAST, f"checkpoint.load={tmp_path}"]))
    (tmp_path / "latest").write_text("step_00000004")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole: .*step_00000004 is missing"
    ):
        open_run(load_recipe(recipe_path, [*FAST, f"checkpoint.save={tmp_path}"]))


def test_a_checkpoint_with_a_missing_file_is_refused(
    trained: Recipe, recipe_path: Path, tmp_path: Path
) -> None:
    source = store.find_checkpoint(trained.checkpoint.save)
    copy = tmp_path / source.name
    copy.mkdir()
    for file in source.iterdir():
        if file.suffix != ".distcp":
            (copy / file.name).write_bytes(file.read_bytes())
    missing = rf"{source.name}/__0_0\.distcp: No such file"
    with pytest.raises(DamagedCheckpointError, match=missing):
        open_run(load_recipe(recipe_path, [*FAST, f"checkpoint.load={copy}"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.train_iters=1000", "needs 4000 packs, but the plan .* holds"),
        ("model.language.vocab_size=64", "vocab_size is 64, but the tokenizer .* has"),
        ("data.plan=/nowhere", "vita data plan"),
        ("data.seq_length=512", "seq_length"),
        ("data.seed=99", "seed"),
        ("media.max_tiles=2", "max_tiles"),
        ("data.train=[{name: other, shards: /nowhere/*.tar}]", "/nowhere"),
    ],
)
def test_a_recipe_that_does_not_fit_its_data_is_refused(
    recipe_path: Path, override: str, message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        open_run(load_recipe(recipe_path, [*FAST, override]))


def test_a_run_that_diverges_stops_and_names_step_and_packs(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_vita.training.step.normalize",
        lambda tiles, *_, **__: tiles.float() * float("nan"),
    )
    with pytest.raises(VitaError, match=r"step 1: loss nan.*packs 1 to 4"):
        train(load_recipe(recipe_path, FAST))


def test_a_damaged_sample_is_masked_and_stops_a_run_that_allows_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vita.platform.set_up_logging", lambda _: None)
    path = make_toy_run(tmp_path, samples=30)
    shard = next((tmp_path / "shards").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT")
    data[at + 4 : at + 40] = bytes(36)
    shard.write_bytes(bytes(data))
    one_epoch = [*FAST, "training.train_iters=3"]
    with pytest.raises(VitaError, match=rf"1 of \d+ samples are damaged.*{shard.name}.*image0"):
        train(load_recipe(path, [*one_epoch, "data.max_damaged=0"]))
    with caplog.at_level(logging.INFO):
        train(load_recipe(path, one_epoch))
    assert "1 damaged samples" in caplog.text


def test_several_datasets_report_their_own_losses(tmp_path: Path) -> None:
    path = make_toy_run(tmp_path, samples=30)
    shards = tmp_path / "shards" / "*.tar"
    both = f"data.train=[{{name: one, shards: {shards}}}, {{name: two, shards: {shards}}}]"
    overrides = [*FAST, both, f"training.tensorboard_dir={tmp_path / 'tb'}"]
    data_tools("plan", path, *overrides)
    train(load_recipe(path, overrides))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"train/loss/one", "train/loss/two"} <= set(events.Tags()["scalars"])


def test_a_samples_weight_multiplies_its_losses_and_their_gradients(recipe_path: Path) -> None:
    """Weight 0 is as if its labels were not there, but for the number of rows that the sum is
    divided by."""
    recipe = load_recipe(
        recipe_path, [*FAST, "training.global_batch_size=1", "optimizer.clip_grad=0"]
    )

    def gradients(change: Callable[[Batch], Batch]) -> tuple[StepMetrics, dict[str, torch.Tensor]]:
        run = open_run(recipe)
        batch = run.train_stream[0]
        assert (batch.document_sources >= 0).sum() > 1
        metrics = train_step(run, iter([change(batch)]))
        return metrics, {
            name: p.main_grad.clone() for name, p in run.unwrapped_model.named_parameters()
        }

    def weighted(batch: Batch) -> Batch:
        weights = torch.full(batch.labels.shape, 3.0)
        weights[: batch.document_starts[1]] = 0
        return dataclasses.replace(batch, loss_weights=weights)

    def without_first(batch: Batch) -> Batch:
        labels = batch.labels.clone()
        labels[: batch.document_starts[1]] = -100
        return dataclasses.replace(batch, labels=labels)

    found, grads = gradients(weighted)
    wanted, wanted_grads = gradients(without_first)
    assert found.loss_tokens > wanted.loss_tokens
    assert found.loss * found.loss_tokens == pytest.approx(
        3 * wanted.loss * wanted.loss_tokens, rel=1e-5
    )
    for name, grad in grads.items():
        expected = 3 * wanted_grads[name] * (wanted.loss_tokens / found.loss_tokens)
        assert torch.allclose(grad, expected, rtol=1e-3, atol=1e-6), name
