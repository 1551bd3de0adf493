"""One call gives what a run takes; it agrees with the parts that it is made of."""

import dataclasses

import pytest

from megatron_vita.config import Recipe
from megatron_vita.costs.flops import pack_flops
from megatron_vita.costs.prediction import predict
from megatron_vita.errors import ConfigError
from tests.costs.measured import STEPS
from tests.costs.test_memory import changed


@pytest.fixture
def recipe() -> Recipe:
    return STEPS[0].recipe()


def test_a_run_is_predicted_in_one_call(recipe: Recipe) -> None:
    load = STEPS[0].load()
    found = predict(recipe, load, world_size=2, device="NVIDIA H200")
    assert found.peak_gib == pytest.approx(78.0, rel=0.05)
    assert found.device_gib == pytest.approx(found.peak_gib * 1.035 + 3)
    assert found.seconds == pytest.approx(2.208, rel=0.1)
    assert found.tokens_per_second_per_gpu == pytest.approx(7421, rel=0.1)
    assert found.tflops_per_gpu == pytest.approx(366, rel=0.1)
    counted = pack_flops(recipe, load.lengths, tiles=load.tiles, loss_tokens=load.loss_tokens)
    assert found.flops == 3 * counted


def test_a_device_without_measured_rates_gets_flops_and_memory_alone(recipe: Recipe) -> None:
    known = predict(recipe, STEPS[0].load(), world_size=2, device="H100")
    unknown = predict(recipe, STEPS[0].load(), world_size=2, device="NVIDIA B200")
    assert unknown == dataclasses.replace(known, time=None)
    assert unknown.seconds is None
    assert unknown.tokens_per_second_per_gpu == unknown.tflops_per_gpu == 0


def test_a_step_takes_all_packs_of_all_replicas(recipe: Recipe) -> None:
    batch = changed(recipe, training={"global_batch_size": 12})
    one = predict(recipe, STEPS[0].load(), world_size=2, device="H200")
    many = predict(batch, STEPS[0].load(), world_size=8, device="H200")
    assert many.flops == 12 * one.flops
    assert many.time.attention == pytest.approx(3 * one.time.attention)  # 4 replicas
    assert many.tflops_per_gpu > one.tflops_per_gpu  # one optimizer step for three packs
    with pytest.raises(ConfigError, match="3 ranks are not a multiple of 2"):
        predict(recipe, STEPS[0].load(), world_size=3, device="H200")
