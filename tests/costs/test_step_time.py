"""Predicted times of steps against measurements, and against what layouts and levers must do to them."""

import dataclasses
from typing import Any

import pytest

from megatron_vita.config import Recipe
from megatron_vita.costs.devices import H100, H200, find_device
from megatron_vita.costs.memory.memory import PackLoad
from megatron_vita.costs.step_time import StepTime, step_time
from tests.costs.measured import STEPS, TIMED, Measured
from tests.costs.test_memory import changed

LOAD = STEPS[0].load()
WHOLE = STEPS[0].recipe()


def predict(recipe: Recipe, *, data_parallel: int = 1, **options: Any) -> StepTime:
    return step_time(recipe, H200, data_parallel=data_parallel, load=LOAD, **options)


@pytest.mark.parametrize("step", [*STEPS, *TIMED], ids=lambda step: step.name)
def test_steps_are_within_10_percent_of_those_measured(step: Measured) -> None:
    predicted = step_time(step.recipe(), H200, data_parallel=1, load=step.load())
    assert predicted.total == pytest.approx(step.seconds, rel=0.1)


def test_kinds_of_work_are_near_the_kernels_that_were_summed() -> None:
    """Sums from the 32K step at 040bccf, which recomputed whole layers as `uniform` still does:
    matrix products 1,339 ms with the tower's, attention 334 with the tower's, NCCL 253, vision 278
    in all."""
    found = predict(changed(WHOLE, training={"recompute_method": "uniform"}))
    assert found.linear + found.output == pytest.approx(1.339 - 0.132, rel=0.02)
    assert found.attention == pytest.approx(0.334 - 0.059, rel=0.05)
    assert found.communication == pytest.approx(0.253, rel=0.05)
    assert found.vision == pytest.approx(0.278, rel=0.05)


def test_what_is_kept_is_not_computed_again() -> None:
    keep = predict(changed(WHOLE, training={"recompute_keep_attention_layers": -1}))
    none = predict(changed(WHOLE, training={"recompute_granularity": "none"}))
    full = predict(WHOLE)
    assert none.attention == keep.attention < full.attention
    # MLPs are 203.7 of 233.1 M weights of a layer; of three products their last is not repeated
    assert full.linear / none.linear == pytest.approx(4 / 3 - 203.7 / 233.1 / 9, rel=1e-3)
    assert none.communication / full.communication == pytest.approx(10 / 13)
    assert keep.linear == full.linear
    half = predict(changed(WHOLE, training={"recompute_keep_attention_layers": 14}))
    assert half.attention == pytest.approx((full.attention + keep.attention) / 2)


def test_copies_to_the_host_are_waited_for_only_where_they_outlast_the_work_beside_them() -> None:
    """Measured at 32K with 8 layers: 0.840 s with copies, 0.826 s without, by a prototype that
    recomputed more."""
    kept = changed(STEPS[-1].recipe(), training={"recompute_keep_attention_layers": -1})
    away = changed(kept, training={"activation_offload_fraction": 1.0})
    assert predict(away).total / predict(kept).total == pytest.approx(0.840 / 0.826, rel=0.02)
    assert predict(away).host_copies == predict(away).total - predict(kept).total
    narrow = dataclasses.replace(H200, host_copy=1e9)
    assert step_time(away, narrow, data_parallel=1, load=LOAD).host_copies > 3


def test_a_pipeline_waits_for_its_slowest_stage_and_fills_and_drains() -> None:
    one = predict(changed(WHOLE, training={"global_batch_size": 8}))
    piped = changed(
        WHOLE,
        parallel={"pipeline_model_parallel_size": 4},
        training={"global_batch_size": 8},
    )
    found = predict(piped)
    assert found.linear == pytest.approx(one.linear / 4)
    busy = found.total - found.bubble - found.optimizer
    assert found.bubble == pytest.approx(busy * 3 / 8)
    interleaved = predict(changed(piped, parallel={"virtual_pipeline_model_parallel_size": 7}))
    assert interleaved.bubble == pytest.approx(found.bubble / 7)


def test_gradients_of_replicas_are_reduced_in_the_open_unless_overlapped() -> None:
    alone = predict(WHOLE).optimizer
    replicas = predict(WHOLE, data_parallel=8).optimizer
    assert replicas > alone
    overlapped = changed(
        WHOLE, parallel={"overlap_grad_reduce": True, "overlap_param_gather": True}
    )
    assert predict(overlapped, data_parallel=8).optimizer < alone
    assert predict(WHOLE, data_parallel=8, ranks_per_node=16).optimizer < replicas


def test_an_optimizer_with_less_state_moves_fewer_bytes_and_one_on_the_host_takes_seconds() -> None:
    lean = changed(WHOLE, optimizer={
        "use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16",
        "store_param_remainders": True, "main_grads_dtype": "bf16",
    })  # fmt: skip
    assert predict(lean).optimizer < 0.6 * predict(WHOLE).optimizer
    away = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    whole = predict(changed(WHOLE, optimizer=away)).optimizer
    half = predict(changed(WHOLE, optimizer=away | {"optimizer_offload_fraction": 0.5})).optimizer
    assert 1 < half < whole < 10


def test_frozen_weights_take_no_gradients_and_a_frozen_tower_no_backward() -> None:
    language = predict(changed(WHOLE, training={"freeze_language_model": True}))
    assert language.linear == pytest.approx(predict(WHOLE).linear * 3 / 4, rel=0.03)
    assert language.optimizer < 0.2 * predict(WHOLE).optimizer
    tower = predict(changed(WHOLE, training={"freeze_vision_model": True}))
    assert tower.vision == pytest.approx(predict(WHOLE).vision / 4.2, rel=0.05)


def test_attention_is_by_the_lengths_of_documents_and_the_backends_rates() -> None:
    one = dataclasses.replace(LOAD, lengths=(32768,))
    long = step_time(WHOLE, H200, data_parallel=1, load=one).attention
    assert 2.5 < long / predict(WHOLE).attention < 4  # 4 times the work, at a better rate
    joined = changed(WHOLE, data={"isolate_documents": False})
    assert predict(joined).attention == long
    flash = changed(WHOLE, parallel={"attention_backend": "fa4"})
    assert predict(flash).attention < 0.85 * predict(WHOLE).attention


def test_rates_are_interpolated_between_lengths_and_kept_beyond_them() -> None:
    rates = [H200.attention_rates("te", length)[0] for length in (1, 2048, 4096, 8192, 1 << 20)]
    assert rates == [322e12, 322e12, pytest.approx(401e12), 480e12, 528e12]


@pytest.mark.parametrize(
    ("name", "device"),
    [("NVIDIA H200", H200), ("NVIDIA H100 80GB HBM3", H100), ("NVIDIA A100-SXM4-80GB", None)],
)
def test_devices_are_known_by_their_names(name: str, device: object) -> None:
    assert find_device(name) is device


def test_text_alone_takes_no_time_for_vision() -> None:
    text = changed(WHOLE, model={"text_only": True})
    load = PackLoad(tiles=0, loss_tokens=1000)
    assert step_time(text, H200, data_parallel=1, load=load).vision == 0
