"""`training.fit_memory` chooses on the machine of the run, again after each start, and says what."""

import logging
from pathlib import Path

import pytest

from megatron_vita import platform
from megatron_vita.config import Recipe, TrainingConfig, load_recipe
from megatron_vita.errors import ConfigError
from megatron_vita.training import loop
from megatron_vita.training.loop import train
from megatron_vita.training.run import fitting
from megatron_vita.training.run.run import Run

GIB = 1 << 30


def test_a_resumed_run_chooses_anew_and_a_run_that_cannot_fit_says_what_would(
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs: list[Run] = []

    def open_and_note(recipe: Recipe) -> Run:
        runs.append(open_run(recipe))
        return runs[-1]

    open_run = loop.open_run
    monkeypatch.setattr(loop, "open_run", open_and_note)
    monkeypatch.setattr(platform, "set_up_logging", lambda _: None)
    fields = [
        "training.fit_memory=true",
        "training.eval_interval=0",
        "training.tensorboard_dir=''",
        "data.num_workers=0",
        f"checkpoint.save={tmp_path}",
        "checkpoint.save_interval=2",
    ]

    def start(gib: float, *more: str) -> None:
        # libraries' 3 GiB stand beside a toy model's few MB
        monkeypatch.setattr(platform, "device_memory", lambda: int(gib * GIB))
        train(load_recipe(recipe_path, [*fields, *more]))

    with caplog.at_level(logging.INFO):
        start(8, "training.train_iters=2")
        assert runs[-1].recipe.training.recompute_granularity == "none"
        assert "training.fit_memory chose: none; a rank needs about 3." in caplog.text
        need = fitting.memory_need(runs[-1].recipe, data_parallel=1).device / GIB
        start((need - 0.0005) / 0.97, "training.train_iters=4")
    chosen = runs[-1].recipe.training
    assert chosen.recompute_granularity != "none" or chosen.recompute_vision
    assert "resumed from" in caplog.text
    assert "resumed with changes" in caplog.text
    assert "step 4/4" in caplog.text
    with pytest.raises(
        ConfigError,
        match=r"fit_memory: at the least a rank needs 3\.\d GiB .* has 1\.0 GiB .*: try",
    ):
        start(1, "training.train_iters=6")


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    platform.initialize_process()
    monkeypatch.setattr(platform, "available_host_memory", lambda: 80 * GIB)
    monkeypatch.setattr(platform, "device_memory", lambda: 7 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    recipe = Recipe(training=TrainingConfig(fit_memory=True, activation_offload_gib=3))
    assert fitting._least_room(recipe) == fitting.Room(
        device=7 * GIB, host=10 * GIB, pinned=3 * GIB
    )
