"""Types of the optimizer's state: a run goes on under any of them, and what none can do is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita import platform
from megatron_vita.errors import CheckpointError, PlatformError
from megatron_vita.parallel import groups
from megatron_vita.platform.remainders import join_weights, split_weights
from megatron_vita.training.optimizer import state as optimizer_state
from megatron_vita.training.optimizer.optimizer import check_optimizer
from megatron_vita.training.run import run
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import assemble_run
from megatron_vita.training.run.run_state import restore, save_run
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import my_batches, small_buckets
from tests.functional.synthetic import tiny_recipe
from tests.training.fused_adam import installed, numpy_join, numpy_split

AWARE = {"use_precision_aware_optimizer": True}
SETTINGS: dict[str, dict] = {
    "plain": {},
    "aware": AWARE,
    "remainders": AWARE | {"store_param_remainders": True},
    "least": AWARE
    | {
        "store_param_remainders": True,
        "main_grads_dtype": "bf16",
        "exp_avg_dtype": "bf16",
        "exp_avg_sq_dtype": "bf16",
        "reduce_scatter_with_fp32_accumulation": True,
    },
    "fp16 weights": AWARE | {"main_params_dtype": "fp16", "exp_avg_dtype": "fp8"},
}
EXACT = ("plain", "aware", "remainders")
"""Settings under which the same numbers are kept, in other places."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds the first of two steps under each setting."""
    platform.initialize_process()
    folder = tmp_path_factory.mktemp("precision")
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_optimizer", lambda _: None)
        for name in SETTINGS:
            first = open_under(name, folder / name)
            train_step(first, iter(my_batches(first, 0)))
            save_run(first)
        yield folder


def open_under(setting: str, folder: Path) -> run.Run:
    """Open a run that resumes from `folder`; all start from the same weights."""
    recipe = tiny_recipe(bf16=True, num_layers=2, **SETTINGS[setting])
    recipe = recipe.replaced({"checkpoint.save": str(folder)})
    groups.initialize_groups(recipe.parallel)
    with small_buckets():
        opened = assemble_run(recipe)
    if folder.exists():
        restore(opened, ResumePoint.find(opened.recipe))
    return opened


def second_step(setting: str, folder: Path) -> tuple[float, torch.Tensor]:
    """Loss of the step that follows the one in `folder`, and the weights after it."""
    resumed = open_under(setting, folder)
    assert resumed.step == 1
    loss = train_step(resumed, iter(my_batches(resumed, 1))).loss
    return loss, torch.cat([p.detach().flatten() for p in resumed.unwrapped_model.parameters()])


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> tuple[float, torch.Tensor]:
    """The second step in full precision."""
    return second_step("plain", folder / "plain")


def main_weights(opened: run.Run) -> torch.Tensor:
    shards = optimizer_state._shards(opened.optimizer, opened.chunks)
    return torch.cat([shard.main for shard in shards])


@pytest.mark.parametrize("now", EXACT)
@pytest.mark.parametrize("saved", EXACT)
def test_settings_that_keep_the_same_numbers_take_up_the_same_bits(
    folder: Path, uninterrupted: tuple[float, torch.Tensor], saved: str, now: str
) -> None:
    expected, found = (main_weights(open_under(name, folder / saved)) for name in (saved, now))
    assert torch.equal(found, expected)
    loss, weights = second_step(now, folder / saved)
    if "remainders" in (saved, now):  # in which halves are rounded away from zero, not to even
        assert loss == pytest.approx(uninterrupted[0], rel=1e-4)
    else:
        assert loss == uninterrupted[0]
        assert torch.equal(weights, uninterrupted[1])


def test_remainders_go_on_as_if_never_interrupted(folder: Path) -> None:
    whole = open_under("remainders", folder / "never saved")
    for step in range(2):
        loss = train_step(whole, iter(my_batches(whole, step))).loss
    resumed_loss, weights = second_step("remainders", folder / "remainders")
    assert resumed_loss == loss
    expected = torch.cat([p.detach().flatten() for p in whole.unwrapped_model.parameters()])
    assert torch.equal(weights, expected)


@pytest.mark.parametrize(
    ("saved", "now"),
    [("plain", "least"), ("least", "plain"), ("least", "least"), ("remainders", "fp16 weights"),
     ("fp16 weights", "aware"), ("fp16 weights", "fp16 weights"), ("fp16 weights", "least")],
)  # fmt: skip
def test_a_run_goes_on_under_settings_that_round_more_or_less(
    folder: Path, uninterrupted: tuple[float, torch.Tensor], saved: str, now: str
) -> None:
    loss, weights = second_step(now, folder / saved)
    assert loss == pytest.approx(uninterrupted[0], rel=0.02)
    change = (weights.float() - uninterrupted[1].float()).abs()
    assert change.max() < 2**-7  # two steps of bf16 below 1; the rate is 1e-3
    assert change.mean() < 1e-4


def test_a_state_whose_weights_are_not_the_models_is_refused_under_remainders_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = optimizer_state._load

    def load_changed(optimizer: Any, state: dict, **kwargs: Any) -> None:
        for values in state["param_state"][0]["param"].values():
            values.mul_(1.01)
        load(optimizer, state, **kwargs)

    monkeypatch.setattr(optimizer_state, "_load", load_changed)
    for setting in ("plain", "remainders", "fp16 weights"):
        with pytest.raises(CheckpointError, match="optimizer's weights are not those of the model"):
            open_under(setting, folder / "plain")


def test_weights_of_32_bits_are_joined_and_split_as_the_kernel_does() -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F800000, 0]).to(torch.int32)
    weights = torch.cat([bits, halves, halves | -(2**31)]).view(torch.float32)
    weights = weights[weights.isfinite() & (weights.abs() < 1e38)]
    upper, lower = split_weights(weights)
    expected = numpy_split(weights)
    assert torch.equal(upper.view(torch.int16), expected[0].view(torch.int16))
    assert torch.equal(lower, expected[1])
    assert torch.equal(join_weights(upper, lower).view(torch.int32), weights.view(torch.int32))
    assert torch.equal(numpy_join(upper, lower).view(torch.int32), weights.view(torch.int32))
    is_half = lower == -(2**15)
    assert torch.equal(upper[~is_half], weights[~is_half].to(torch.bfloat16))
    assert is_half.sum() >= 4


@pytest.mark.skipif(platform.on_cuda(), reason="of machines without CUDA")
def test_what_needs_a_gpu_is_refused_by_name_without_one() -> None:
    recipe = tiny_recipe(bf16=True, **AWARE)
    with pytest.raises(
        PlatformError, match="use_precision_aware_optimizer is true, but CUDA is not present"
    ):
        check_optimizer(recipe)
