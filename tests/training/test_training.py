"""Results, reports and errors of a training run."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vita.checkpoint import store
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.data.batch import Batch
from megatron_vita.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    DataError,
    VitaError,
)
from megatron_vita.training import loop
from megatron_vita.training.callbacks import validation
from megatron_vita.training.callbacks.tensorboard import TensorBoardCallback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.run.run_state import check_rotary
from megatron_vita.training.step.step import train_step
from tests.functional.toy_run import QUICK, data_tools, make_toy_run

PARTS = ("vision_model", "projector", "language_model")
NO_RUN = cast(Run, None)
FAST = [*QUICK, "training.train_iters=2"]


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


@pytest.mark.parametrize(
    "override",
    [
        "model.language.rotary_base=5.0e7",
        "model.language.rope_scaling={kind: linear, factor: 4}",
        "model.language.rope_scaling={kind: yarn, factor: 4, original_length: 256}",
    ],
)
def test_a_stage_may_start_with_other_rotary_angles_but_not_resume_with_them(
    trained: Recipe, recipe_path: Path, override: str
) -> None:
    load = f"checkpoint.load={trained.checkpoint.save}"
    run = open_run(load_recipe(recipe_path, [*FAST, load, override]))
    same = open_run(load_recipe(recipe_path, [*FAST, load]))
    weights = (run.unwrapped_model.state_dict(), same.unwrapped_model.state_dict())
    for name, value in weights[1].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(weights[0][name], value), name
    save = f"checkpoint.save={trained.checkpoint.save}"
    with pytest.raises(CheckpointError, match=r"model\.language\.(rotary_base|rope_scaling\.kind)"):
        open_run(load_recipe(recipe_path, [*FAST, save, override]))


LONG = {
    "model.language.rotary_base": 5e7,
    "model.language.rope_scaling": {"kind": "linear", "factor": 4},
}


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"model.language.rotary_base": 1e6}, "rotary_base is 1e.06, but 5e.07"),
        ({"model.language.rope_scaling.factor": 2}, "rope_scaling.factor is 2, but 4"),
        ({"model.language.rope_scaling": {"kind": "none", "factor": 4}},
         "rope_scaling.kind is none, but linear"),
    ],
    ids=["base", "factor", "kind"],
)  # fmt: skip
def test_a_stage_does_not_start_with_positions_that_were_shrunk(fields: dict, lost: str) -> None:
    saved = Recipe().replaced(LONG)
    with pytest.raises(CheckpointError, match=rf"model\.language\.{lost} in the recipe of old"):
        check_rotary(Path("old"), saved, saved.replaced(fields))
    check_rotary(Path("old"), Recipe(), saved)


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
        "megatron_vita.training.step.step.normalize",
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
