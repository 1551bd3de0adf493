"""Learning rates and weight decay of a run's parameters."""

import math
from pathlib import Path

import pytest

from megatron_vita.config import load_recipe
from megatron_vita.training.run.run import open_run
from tests.functional.toy_run import QUICK

FAST = [*QUICK, "training.train_iters=2"]


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
