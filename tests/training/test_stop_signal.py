"""Signals that end a run: after its step with a checkpoint, or at once."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vita.config import load_recipe
from megatron_vita.data.batch import Batch
from megatron_vita.errors import (
    StoppedError,
)
from megatron_vita.training import loop
from megatron_vita.training.callbacks import validation
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run import stop_signal
from megatron_vita.training.run.run import Run
from megatron_vita.training.step.step import train_step
from tests.functional.toy_run import QUICK

FAST = [*QUICK, "training.train_iters=2"]


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
