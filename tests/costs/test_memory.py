"""Estimates of memory against measurements and against counting by hand."""

import dataclasses
from typing import Any

import pytest

from megatron_vita.config import LanguageConfig, ModelConfig, Recipe, TrainingConfig
from megatron_vita.costs.memory.host_memory import host_memory, saving_memory
from megatron_vita.costs.memory.layer_memory import LayerPlan, layer_tensors, plan_layers
from megatron_vita.costs.memory.memory import GIB, PackLoad, RankMemory, rank_memory
from megatron_vita.costs.memory.optimizer_memory import OptimizerBytes, optimizer_bytes
from megatron_vita.costs.memory.parameters import model_parameters
from megatron_vita.costs.memory.schedule import most_kept
from tests.costs.measured import STEPS, TOO_LARGE, Measured


def estimate(recipe: Recipe, *, stage: int = 0, tiles: int = 0, rows: int = 0) -> RankMemory:
    load = PackLoad(tiles=tiles, loss_tokens=rows)
    return rank_memory(recipe, stage, data_parallel=1, load=load)


def changed(recipe: Recipe, **groups: dict[str, Any]) -> Recipe:
    """The recipe with other values in some groups."""
    parts = {
        name: dataclasses.replace(getattr(recipe, name), **values)
        for name, values in groups.items()
    }
    return dataclasses.replace(recipe, **parts)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_peaks_are_within_5_percent_of_those_measured(step: Measured) -> None:
    memory = rank_memory(step.recipe(), 0, data_parallel=1, load=step.load())
    assert memory.peak / GIB == pytest.approx(step.peak, rel=0.05)
    assert sum(memory.parts().values()) == memory.peak


@pytest.mark.parametrize("step", TOO_LARGE, ids=lambda step: step.name)
def test_runs_that_were_out_of_memory_are_not_said_to_fit(step: Measured) -> None:
    memory = rank_memory(step.recipe(), 0, data_parallel=1, load=step.load())
    assert memory.device > step.peak * GIB


def test_parameters_take_18_bytes_of_which_a_distributed_optimizer_shares_12() -> None:
    """69 GiB a GPU at TP2, of which 38 stand before Adam's moments are made: measured."""
    memory = estimate(STEPS[0].recipe())
    static = memory.weights + memory.gradients + memory.optimizer
    assert static / GIB == pytest.approx(69, rel=0.01)
    assert (static - memory.optimizer * 8 / 12) / GIB == pytest.approx(38, rel=0.02)
    shared = rank_memory(
        STEPS[0].recipe(), 0, data_parallel=4, load=PackLoad(tiles=0, loss_tokens=0)
    ).optimizer
    assert shared * 4 == memory.optimizer


LEAST = {
    "main_grads_dtype": "bf16",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
    "store_param_remainders": True,
}
KINDS: list[tuple[dict[str, Any], tuple[float, ...]]] = [
    # gradient, state on the device, copies while stepping, state on the host
    ({}, (4, 12, 0, 0)),
    (LEAST, (2, 6, 0, 0)),
    (LEAST | {"store_param_remainders": False}, (2, 8, 0, 0)),
    (LEAST | {"exp_avg_dtype": "fp8"}, (2, 5, 8, 0)),
    ({"exp_avg_dtype": "bf16"}, (4, 10, 4, 0)),
    ({"main_params_dtype": "fp16"}, (4, 10, 4, 0)),
    ({"optimizer_cpu_offload": True}, (4, 0, 0, 18)),
    ({"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}, (4, 6, 0, 9)),
    ({"optimizer_cpu_offload": True, "main_grads_dtype": "bf16"}, (2, 0, 0, 18)),
]


@pytest.mark.parametrize(("settings", "expected"), KINDS)
def test_types_of_the_optimizers_state_take_the_bytes_of_their_kind(
    settings: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    aware = {"use_precision_aware_optimizer": True} | settings
    recipe = changed(STEPS[0].recipe(), optimizer=aware)
    gradient, state, temporary, host = expected
    assert optimizer_bytes(recipe) == OptimizerBytes(
        gradient=gradient, state=state, temporary=temporary, host=host
    )


def test_the_least_optimizer_leaves_10_bytes_a_parameter_where_the_plain_one_takes_18() -> None:
    """38 of 69 GiB; half of it divided over two ranks that share the state."""
    least = {"use_precision_aware_optimizer": True, **LEAST}
    recipe = changed(STEPS[0].recipe(), optimizer=least)
    memory = estimate(recipe)
    assert (memory.weights + memory.gradients + memory.optimizer) / GIB == pytest.approx(
        38, rel=0.02
    )
    two = rank_memory(recipe, 0, data_parallel=2, load=PackLoad(tiles=0, loss_tokens=0))
    assert two.optimizer * 2 == memory.optimizer
    assert two.gradients == memory.gradients


def test_the_host_holds_an_optimizer_that_is_kept_there() -> None:
    plain = STEPS[0].recipe()
    away = changed(
        plain, optimizer={"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    )
    load = PackLoad(tiles=0, loss_tokens=0)
    on_host = host_memory(away, 0, data_parallel=1, load=load)
    assert on_host.optimizer * 12 == pytest.approx(estimate(plain).optimizer * 18, rel=1e-6)
    assert on_host.training - host_memory(plain, 0, data_parallel=1, load=load).training == (
        on_host.optimizer
    )
    assert estimate(away).optimizer == 0


def test_a_tile_that_is_not_recomputed_keeps_what_was_measured() -> None:
    """0.86 GiB, on the same machine and day as the steps."""
    recipe = changed(STEPS[0].recipe(), training={"recompute_vision": False})
    more = estimate(recipe, tiles=200).highest.vision - estimate(recipe, tiles=100).highest.vision
    assert more / 50 / GIB == pytest.approx(0.86, rel=0.02)


def test_recomputation_keeps_less_the_more_it_repeats() -> None:
    full, kept, mlp, none = (
        estimate(changed(STEPS[6].recipe(), training=training)).highest.activations
        for training in (
            {"recompute_granularity": "full"},
            {"recompute_granularity": "full", "recompute_keep_attention_layers": -1},
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            {"recompute_granularity": "none"},
        )
    )
    attention = estimate(
        changed(STEPS[6].recipe(), training={"recompute_granularity": "selective"})
    ).highest.activations
    # Inputs alone; bytes counted by hand for 65,536 rows of 3,584, 131,072 of 14 + 2 x 2 heads of
    # 128, and 131,072 of an MLP of 9,472; fused attention makes nothing that core_attn could drop.
    hidden = 65536 * 3584 * 2
    heads = 131072 * 128 * 2
    mlp_width = 131072 * 9472 * 2
    sums = 131072 * 14 * 4  # attention's log-sum-exps
    assert full == 8 * hidden
    assert kept == 8 * (hidden + 14 * heads + sums)
    assert mlp == 8 * (3 * hidden + (2 * 14 + 4) * heads + sums)
    assert none == mlp + 8 * (hidden + 3 * mlp_width)
    assert attention == none


def test_the_last_recomputed_layers_keep_attention() -> None:
    recipe = changed(STEPS[0].recipe(), training={"recompute_keep_attention_layers": 10})
    tensors = layer_tensors(recipe)
    assert estimate(recipe).highest.activations == 28 * tensors.hidden + 10 * (
        tensors.query + tensors.log_sums
    )


def test_an_mlp_in_pieces_takes_the_memory_of_a_piece_and_of_its_weights_gradients() -> None:
    """128K tokens of a layer whose MLP takes 16K at a time: what 16K would take, and the rest of
    the layer."""
    whole = changed(STEPS[3].recipe(), training={"recompute_keep_attention_layers": -1})
    pieces = changed(whole, training={"mlp_chunk_tokens": 16384})
    tensors = layer_tensors(whole)
    plan = LayerPlan(kept="input_and_attention", pieces=8)
    assert plan_layers(pieces, 28) == [plan] * 28
    inside = 2 * tensors.hidden + 5 * tensors.mlp  # gradients of gate and up among them
    before = 3 * tensors.hidden  # projection, sum and gradient are of all rows
    assert tensors.mlp_working(LayerPlan(kept="input_and_attention")) == before + inside
    in_pieces = before + inside // 8 + 6 * tensors.weight
    assert tensors.mlp_working(plan) == pytest.approx(in_pieces, rel=0.02)
    # attention, which no lever cuts, is now the most; cuDNN's fp32 gradient of q among it
    assert estimate(pieces).highest.temporary == tensors.attention_working("input_and_attention")
    assert tensors.attention_working("input_and_attention") < 0.5 * tensors.working(
        LayerPlan(kept="input_and_attention")
    )


def test_a_tower_from_pixels_keeps_nothing_else_and_takes_a_turn_of_tiles() -> None:
    recipe = changed(
        STEPS[0].recipe(),
        data={"seq_length": 1024},
        training={"recompute_vision_method": "tiles", "vision_tiles_at_once": 8},
    )
    memory = estimate(recipe, tiles=76).highest
    assert memory.name == "vision"
    assert memory.vision == 38 * 3 * 448**2 * 2
    # 8 tiles without recomputation (0.86 GiB each), and gradients of 312 M weights in fp32 and bf16
    assert memory.temporary / GIB == pytest.approx(8 * 0.86 + 0.312 * 6, rel=0.1)


def test_block_and_uniform_recomputation_keep_inputs_of_layers_and_of_groups() -> None:
    recipe = STEPS[0].recipe()
    tensors = layer_tensors(recipe)
    block = changed(recipe, training={"recompute_num_layers": 20})
    assert estimate(block).highest.activations == (
        20 * tensors.hidden + 8 * tensors.kept("everything")
    )
    uniform = changed(recipe, training={"recompute_method": "uniform", "recompute_num_layers": 4})
    assert estimate(uniform).highest.activations == 7 * tensors.hidden
    more = estimate(uniform).highest.temporary - estimate(recipe).highest.temporary
    assert more == 3 * tensors.kept("everything")


def test_activations_on_the_host_leave_the_device_but_for_two_layers() -> None:
    """At 256K, what 28 layers keep waits on the host: 74 GiB a rank were measured with a prototype
    that sent the MLP's input too, 3 in place of 2 hidden states."""
    recipe = changed(
        STEPS[0].recipe(),
        data={"seq_length": 256 * 1024},
        training={"recompute_keep_attention_layers": -1, "mlp_chunk_tokens": 16384},
    )
    away = changed(recipe, training={"activation_offload_fraction": 1.0})
    tensors = layer_tensors(recipe)
    here = estimate(recipe).highest
    there = estimate(away).highest
    assert here.activations == 28 * (tensors.hidden + tensors.query + tensors.log_sums)
    assert there.activations == 28 * tensors.log_sums
    # a layer's own tensors, and those of the layer whose backward comes next
    assert there.temporary - here.temporary == 2 * (tensors.hidden + tensors.query)
    load = PackLoad(tiles=0, loss_tokens=0)
    host = host_memory(away, 0, data_parallel=1, load=load)
    assert host.activations / GIB == pytest.approx(74.4 * 2 / 3, rel=0.02)
    assert host_memory(recipe, 0, data_parallel=1, load=load).activations == 0
    half = changed(recipe, training={"activation_offload_fraction": 0.5})
    assert estimate(half).highest.activations == (here.activations + there.activations) / 2


def test_frozen_parts_keep_no_gradients_and_less_for_their_backward() -> None:
    recipe = changed(STEPS[2].recipe(), training={"freeze_language_model": True})
    frozen = estimate(recipe, tiles=76)
    trained = estimate(STEPS[2].recipe(), tiles=76)
    assert frozen.gradients < 0.1 * trained.gradients
    # norm's output is for the weights' gradient alone
    tensors = layer_tensors(recipe)
    saved = trained.highest.activations - frozen.highest.activations
    assert saved == 28 * tensors.hidden
    without_tower = changed(recipe, training={"freeze_vision_model": True})
    assert estimate(without_tower, tiles=76).highest.vision < 0.2 * frozen.highest.vision


@pytest.mark.parametrize(
    ("stages", "chunks", "packs", "stage", "most"),
    [
        (4, 1, 8, 0, 4),
        (4, 1, 8, 3, 1),
        (4, 1, 2, 0, 2),
        (1, 1, 8, 0, 1),
        # 2 x 3 + 1 x 4 + 1 of its chunks, of which by turns 4 packs pass the first and the second
        (4, 2, 8, 0, 11),
        (4, 2, 4, 0, 8),
        (2, 2, 4, 1, 3),
    ],
)
def test_as_many_packs_are_in_flight_as_the_schedule_warms_up_with(
    stages: int, chunks: int, packs: int, stage: int, most: int
) -> None:
    recipe = Recipe().replaced(
        {"parallel.pipeline_model_parallel_size": stages, "training.global_batch_size": packs}
    )
    assert most_kept(recipe, stage, data_parallel=1, chunks=[1] * chunks) == most


def test_the_first_chunk_of_an_interleaved_stage_keeps_the_tower_of_its_own_packs() -> None:
    """Packs 0 to 3 enter chunk 0, then chunk 1, then packs 4 to 7 chunk 0, and not before these does
    a pack leave chunk 0."""
    recipe = Recipe().replaced(
        {"parallel.pipeline_model_parallel_size": 4, "training.global_batch_size": 8}
    )
    assert most_kept(recipe, 0, data_parallel=1, chunks=[1, 0]) == 8
    assert most_kept(recipe, 0, data_parallel=1, chunks=[0, 1]) == 4


def test_each_pack_in_flight_keeps_its_tiles() -> None:
    one = STEPS[0].recipe()
    piped = changed(
        one,
        parallel={"pipeline_model_parallel_size": 4},
        training={"global_batch_size": 8},
    )
    first, second = (estimate(piped, stage=stage, tiles=76).highest for stage in (0, 1))
    assert first.vision == 4 * estimate(one, tiles=76).highest.vision
    assert second.vision == 0
    # 7 layers and the output of each of 4 packs, then of 3; the last one's output is its gradient
    hidden = layer_tensors(one).hidden
    assert first.activations == (4 * 8 - 1) * hidden
    assert second.activations == (3 * 8 - 1) * hidden


def test_short_packs_are_highest_where_the_vocabulary_is() -> None:
    """The word embedding's gradient in bf16, 152,064 / 2 rows of 3,584; or fp32 logits of all rows."""
    recipe = changed(STEPS[0].recipe(), data={"seq_length": 1024})
    highest = estimate(recipe, rows=1024).highest
    assert highest.name == "embedding"
    assert highest.temporary == (152064 // 2 + 1024 + 512) * 3584 * 2
    full = changed(
        recipe, model={"output": dataclasses.replace(recipe.model.output, full_logits=True)}
    )
    highest = estimate(full, rows=1024).highest
    assert highest.name == "output"
    assert highest.temporary > 1024 * 152064 // 2 * 14


def test_the_host_holds_processes_and_the_tiles_of_packs_ahead() -> None:
    """3.5 GiB, one loader process, and 2 + 2 packs of 38 of 76 tiles of 448 x 448."""
    load = PackLoad(tiles=76, loss_tokens=0)
    host = host_memory(STEPS[0].recipe(), 0, data_parallel=1, load=load)
    assert host.process == 3.5 * GIB
    assert host.loader == (300 << 20) + 4 * 38 * 3 * 448**2
    assert host.saving == 0  # no checkpoint.save
    saved = changed(STEPS[0].recipe(), checkpoint={"save": "somewhere"})
    assert host_memory(saved, 0, data_parallel=1, load=load).saving == saving_memory(
        saved, 0, data_parallel=1
    )


@pytest.mark.parametrize(("ranks", "measured"), [(1, 6.8), (2, 5.0), (8, 0)])
def test_a_save_takes_what_a_rank_writes_and_no_more(ranks: int, measured: float) -> None:
    """2 bytes of each weight and 12 of optimizer state, divided among the replicas; fewer were
    measured (benchmarks/results/2026-11-28-saving.md)."""
    recipe = Recipe(
        model=ModelConfig(text_only=True, language=LanguageConfig(num_layers=8, hidden_size=1024)),
        training=TrainingConfig(bf16=True),
    )
    estimate = saving_memory(recipe, 0, data_parallel=ranks) / model_parameters(recipe.model)
    assert estimate == pytest.approx(14 / ranks, rel=0.01)
    assert measured <= estimate
