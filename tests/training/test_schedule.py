"""The learning rate of every step, against formulas written by hand."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_vita import platform  # noqa: F401  before megatron-core
from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.config.miniature import shrink
from megatron_vita.errors import ConfigError
from megatron_vita.registry import register
from megatron_vita.training.optimizer.schedule import build_schedule

STEPS = 20
PEAK = 0.8
LOW = 0.1


def schedule_of(**fields: Any) -> Recipe:
    return recipe_from_dict(
        {"optimizer": {"lr": PEAK} | fields, "training": {"train_iters": STEPS}}
    )


def rates(recipe: Recipe) -> list[float]:
    """The learning rate that each step is made with."""
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = build_schedule(cast(Any, optimizer), recipe)
    found = []
    for _ in range(recipe.training.train_iters):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return found


def between(step: float, first: float, last: float) -> float:
    return (step - first) / (last - first)


def linear(done: float) -> float:
    return 1 - done


def cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def exponential(done: float) -> float:
    return 2 * 0.5**done - 1


def minus_sqrt(done: float) -> float:
    return 1 - math.sqrt(done)


def expected(step: int, *, warmup: int, start: int, end: int, course: Callable) -> float:
    """Risen until `warmup`, at the peak until `start`, at the lowest from `end`."""
    if step < warmup:
        return PEAK * step / warmup
    if step <= start:
        return PEAK
    if step >= end:
        return LOW
    return LOW + (PEAK - LOW) * course(between(step, start, end))


@pytest.mark.parametrize("course", [linear, cosine])
@pytest.mark.parametrize("end", [0, 15])
def test_linear_and_cosine_fall_from_the_end_of_warmup(course: Callable, end: int) -> None:
    recipe = schedule_of(
        min_lr=LOW, lr_decay_style=course.__name__, lr_warmup_iters=4, lr_decay_iters=end
    )
    lengths = {"warmup": 4, "start": 4, "end": end or STEPS}
    wanted = [expected(step, **lengths, course=course) for step in range(STEPS)]
    assert rates(recipe) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("course", [linear, cosine, exponential, minus_sqrt])
@pytest.mark.parametrize("end", [0, 16])
def test_wsd_is_stable_until_its_decay_begins(course: Callable, end: int) -> None:
    recipe = schedule_of(
        min_lr=LOW, lr_decay_style="WSD", lr_warmup_iters=3, lr_decay_iters=end,
        lr_wsd_decay_iters=6, lr_wsd_decay_style=course.__name__,
    )  # fmt: skip
    last = end or STEPS
    lengths = {"warmup": 3, "start": last - 6, "end": last}
    wanted = [expected(step, **lengths, course=course) for step in range(STEPS)]
    assert rates(recipe) == pytest.approx(wanted, rel=1e-12)


def test_a_registered_course_runs_between_warmup_and_the_end_of_the_decay() -> None:
    def staircase(done: float) -> float:
        return 1 - int(4 * done) / 4

    register("schedule", "staircase", staircase)
    recipe = schedule_of(
        min_lr=LOW, lr_decay_style="staircase", lr_warmup_iters=4, lr_decay_iters=16
    )
    lengths = {"warmup": 4, "start": 4, "end": 16}
    wanted = [expected(step, **lengths, course=staircase) for step in range(STEPS)]
    assert rates(recipe) == pytest.approx(wanted, rel=1e-12)
    assert len(set(wanted[4:16])) == 4
    assert rates(schedule_of(lr_decay_style="staircase", lr_warmup_fraction=0))[0] == PEAK


def test_a_constant_rate_stays_at_the_peak() -> None:
    recipe = schedule_of(lr_decay_style="constant", lr_warmup_fraction=0.25)
    wanted = [PEAK * step / 5 if step < 5 else PEAK for step in range(STEPS)]
    assert rates(recipe) == pytest.approx(wanted, rel=1e-12)
    assert rates(schedule_of(lr_decay_style="constant", lr_warmup_fraction=0)) == [PEAK] * STEPS


def test_an_inverse_square_root_falls_to_its_lowest_and_no_further() -> None:
    recipe = schedule_of(min_lr=0.5, lr_decay_style="inverse-square-root", lr_warmup_iters=4)
    wanted = [
        PEAK * step / 4 if step < 4 else max(0.5, PEAK * math.sqrt(4 / step))
        for step in range(STEPS)
    ]
    assert rates(recipe) == pytest.approx(wanted, rel=1e-12)
    assert min(wanted[4:]) == 0.5 < wanted[8]


def test_parameters_with_other_rates_follow_in_proportion() -> None:
    recipe = schedule_of(min_lr=LOW, lr_decay_style="WSD", lr_wsd_decay_iters=5)
    groups: list[dict] = [{}, {"max_lr": PEAK / 10, "min_lr": LOW / 10}]
    schedule = build_schedule(cast(Any, SimpleNamespace(param_groups=groups)), recipe)
    for _ in range(STEPS):
        assert groups[1]["lr"] == pytest.approx(groups[0]["lr"] / 10)
        schedule.step(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lr_decay_style": "wsd"},
            "lr_decay_style is 'wsd'; known: constant, linear, cosine, WSD",
        ),
        ({"lr_wsd_decay_style": "sqrt"}, "lr_wsd_decay_style is 'sqrt'; known: linear"),
        ({"lr_decay_style": "WSD"}, "lr_wsd_decay_iters is 0 with lr_decay_style WSD"),
        ({"lr_wsd_decay_iters": 5}, "lr_wsd_decay_iters is 5 with lr_decay_style cosine"),
        ({"lr_warmup_iters": -1}, "lr_warmup_iters is -1: it must be at least 0"),
        ({"lr_warmup_iters": STEPS}, r"rises for 20 steps .* step 20 \(training.train_iters\)"),
        ({"lr_decay_iters": 4, "lr_warmup_iters": 4}, r"step 4 \(optimizer.lr_decay_iters\)"),
        ({"lr_decay_style": "constant", "min_lr": 0.1}, "min_lr is 0.1, but with .* constant"),
        ({"lr_decay_style": "constant", "lr_decay_iters": 9}, "lr_decay_iters is 9, but with"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 17, "lr_warmup_iters": 4},
            r"lr_wsd_decay_iters is 17, but between warm-up and step 20 .* lie 16",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_field(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule_of(**fields)


def test_a_miniature_keeps_the_kind_of_schedule(tmp_path: Any) -> None:
    recipe = recipe_from_dict({
        "optimizer": {"lr_decay_style": "WSD", "lr_warmup_iters": 2000, "lr_decay_iters": 50_000,
                      "lr_wsd_decay_iters": 10_000},
        "training": {"train_iters": 50_000},
    })  # fmt: skip
    tiny = shrink(recipe, world_size=1, bf16=False, data=tmp_path)
    optimizer = tiny.optimizer
    lengths = (optimizer.lr_warmup_iters, optimizer.lr_wsd_decay_iters, optimizer.lr_decay_iters)
    assert (optimizer.lr_decay_style, lengths) == ("WSD", (1, 1, 3))
