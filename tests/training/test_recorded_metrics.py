"""Metrics that callbacks record."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vita import platform
from megatron_vita.config import load_recipe
from megatron_vita.errors import ConfigError
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.meter import Meter
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run
from tests.functional.toy_run import QUICK

FAST = [*QUICK, "training.tensorboard_dir=''", "training.train_iters=3"]


def test_losses_of_packs_add_up_to_the_loss_of_the_step(recipe_path: Path) -> None:
    class Sum(Callback):
        def on_losses(self, run: Run, losses: torch.Tensor, **_: Any) -> None:
            assert not losses.requires_grad
            run.record("mine/loss", losses.mean(), weight=len(losses))
            run.record("mine/rows", len(losses), reduce="sum")

        def on_log(self, run: Run, metrics: Any) -> None:
            values = metrics.scalars()
            found.append((metrics.loss, values["mine/loss"]))
            assert values["mine/rows"] == metrics.loss_tokens

    found: list[tuple[float, float]] = []
    train(load_recipe(recipe_path, FAST), callbacks=[Sum()])
    assert len(found) == 3
    for loss, mine in found:
        assert mine == pytest.approx(loss, rel=1e-6)


def test_metrics_are_over_all_calls_since_the_step_logged_last(
    recipe_path: Path, tmp_path: Path
) -> None:
    class Count(Callback):
        def before_step(self, run: Run) -> None:
            run.record("mine/before", torch.tensor(float(run.step)))

        def after_step(self, run: Run, metrics: Any) -> None:
            run.record("mine/most", run.step, reduce="max")
            run.record("mine/sum", 1, reduce="sum")

    fields = [*FAST, "training.log_interval=2", f"training.tensorboard_dir={tmp_path}"]
    train(load_recipe(recipe_path, fields), callbacks=[Count()])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(f"mine/{name}")]
        for name in ("before", "most", "sum")
    }
    assert found == {
        "before": [(2, 0.5), (3, 2.0)],
        "most": [(2, 2.0), (3, 3.0)],
        "sum": [(2, 2.0), (3, 1.0)],
    }


def bare_run() -> Run:
    """As much of a run as `record` needs."""
    platform.initialize_process()
    return cast(Run, SimpleNamespace(recorded=Meter()))


def test_a_tensor_is_read_once_and_only_when_it_is_reduced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = []

    def counting(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *arguments: Any) -> Any:
            reads.append(name)
            return original(tensor, *arguments)

        return read

    run = bare_run()
    value = torch.tensor(2.0, requires_grad=True)
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    for reduce in ("mean", "sum", "max", "min"):
        for _ in range(3):
            Run.record(run, reduce, value, reduce=reduce)
    assert reads == []
    run.recorded.reduce()
    reads.clear()
    Run.record(run, "mean", value)
    assert run.recorded.reduce() == {"mean": 2.0}
    assert reads == ["tolist"]


@pytest.mark.parametrize(
    ("name", "value", "reduce", "message"),
    [
        (
            "train/loss",
            1,
            "mean",
            "'train/loss': names that are or begin with train, .* mine/train",
        ),
        ("speed/step_seconds", 1, "mean", "are the loop's own"),
        ("validation", 1, "mean", "are the loop's own"),
        ("step", 1, "mean", "are the loop's own"),
        ("", 1, "mean", "a name has letters"),
        ("a//b", 1, "mean", "a name has letters"),
        ("mine/größe", 1, "mean", "a name has letters"),
        ("a", torch.ones(3), "mean", r"'a' is a tensor of shape \[3\]: one number"),
        ("a", "seven", "mean", "'a' is 'seven': a number or a tensor"),
        ("a", 1, "median", "reduce is 'median'; known: sum, mean, max, min"),
        ("known", 1, "sum", "'known' is reduced by mean elsewhere, by sum here"),
    ],
)
def test_metrics_that_cannot_be_are_refused_by_name(
    name: str, value: Any, reduce: Any, message: str
) -> None:
    run = bare_run()
    Run.record(run, "known", 1)
    with pytest.raises(ConfigError, match=message):
        Run.record(run, name, value, reduce=reduce)


def test_all_own_names_are_refused_to_others(recipe_path: Path) -> None:
    class Names(Callback):
        def on_log(self, run: Run, metrics: StepMetrics) -> None:
            own.update(metrics.scalars())

    own: set[str] = set()
    train(load_recipe(recipe_path, [*FAST, "training.eval_interval=3"]), callbacks=[Names()])
    assert {"train/loss", "validation/loss", "data/fill", "memory/host_gib"} < own
    for name in own:
        with pytest.raises(ConfigError, match="are the loop's own"):
            Run.record(bare_run(), name, 1.0)
