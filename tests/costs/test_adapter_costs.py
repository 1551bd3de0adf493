"""Costs of adapters: parameters, memory, FLOPs and checkpoints, from a recipe alone."""

import json
from pathlib import Path

import pytest

from megatron_vita.config import Recipe, load_recipe
from megatron_vita.costs.devices import H100
from megatron_vita.costs.fitting import GIB, Room, fit_memory
from megatron_vita.costs.flops import (
    attention_flops,
    linear_flops,
    output_flops,
    pack_flops,
    tile_flops,
    training_flops,
)
from megatron_vita.costs.memory.adapters import part_adapters, stage_adapters, whole_adapters
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.costs.memory.host_memory import host_memory
from megatron_vita.costs.memory.layer_memory import layer_tensors
from megatron_vita.costs.memory.memory import (
    PackLoad,
    describe_full_pack,
    full_pack,
    rank_memory,
)
from megatron_vita.costs.memory.parameters import (
    model_parameters,
    stage_parameters,
    trained_parameters,
)
from megatron_vita.costs.memory.quantized import weight_bytes
from megatron_vita.costs.stages import stage_flops
from megatron_vita.costs.step_time import step_time
from megatron_vita.training.dry_report import describe
from megatron_vita.training.dry_run import dry_run
from megatron_vita.training.metrics.wording import describe_quantization
from tests.costs.measured import QWEN_7B
from tests.forked import run_program

EXAMPLES = Path(__file__).parents[2] / "examples" / "long_vita"
SEVEN_B = {
    **{f"model.language.{name}": value for name, value in QWEN_7B.items()},
    "training.bf16": True,
    "training.freeze_language_model": True,
    "training.freeze_vision_model": True,
}
RANK = 16
QKV = 3 * 3584 + 3584 + 2 * 512
PROJECTION = 2 * 3584
GATE_AND_UP = 2 * (3584 + 18944)
DOWN = 18944 + 3584


def adapted(**changes: object) -> Recipe:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return Recipe().replaced(SEVEN_B | {"lora.rank": RANK} | named)


def test_all_linear_maps_of_qwen_7b_have_40_million_parameters_at_rank_16() -> None:
    """PEFT prints 40,370,176 for Qwen2.5-7B with all seven targets."""
    recipe = adapted(training__freeze_projector=True)
    assert whole_adapters(recipe) == RANK * 28 * (QKV + PROJECTION + GATE_AND_UP + DOWN)
    assert whole_adapters(recipe) == trained_parameters(recipe) == 40_370_176
    assert stage_adapters(recipe, 0) == whole_adapters(recipe)


def test_tensor_parallelism_splits_the_side_that_the_map_splits() -> None:
    recipe = adapted(parallel__tensor_model_parallel_size=2)
    split = (
        3 * 3584 + (3584 + 2 * 512) // 2 + 3584 // 2 + 3584 + 2 * 3584 + 18944 + 18944 // 2 + 3584
    )
    assert stage_adapters(recipe, 0) == RANK * 28 * split


def test_a_stage_has_the_adapters_of_its_layers() -> None:
    changes = {
        "parallel__pipeline_model_parallel_size": 2,
        "lora__targets": ["layers.3.*.down_proj", "layers.20.*.o_proj", "projector.fc1"],
        "training__freeze_projector": True,
    }
    recipe = adapted(**changes)
    fc1 = 4 * 1024 + recipe.model.projector_hidden_size
    assert stage_adapters(recipe, 0) == RANK * (DOWN + fc1)
    assert stage_adapters(recipe, 1) == RANK * PROJECTION
    assert part_adapters(recipe, "projector") == RANK * fc1
    assert stage_parameters(recipe, 1).adapters == RANK * PROJECTION


def test_frozen_weights_have_no_gradients_and_layers_keep_their_inputs() -> None:
    recipe = adapted()
    plain = recipe.replaced({"lora": type(recipe.lora)()})
    memory = rank_memory(recipe, 0, data_parallel=1, load=full_pack(recipe))
    assert memory.weights < 2 * 1.01 * model_parameters(recipe.model)
    assert memory.gradients + memory.optimizer < GIB
    with_adapters = layer_tensors(recipe)
    without = layer_tensors(plain)
    assert with_adapters.weight == without.weight == 0
    assert with_adapters.kept("everything") > without.kept("everything")
    trained = recipe.replaced({"lora": plain.lora, "training.freeze_language_model": False})
    assert with_adapters.kept("everything") == layer_tensors(trained).kept("everything")
    lengths = [1024]
    flops = [training_flops(each, lengths, tiles=0, loss_tokens=100) for each in (recipe, trained)]
    assert flops[0].linear * 3 == flops[1].linear * 2


def test_a_checkpoint_of_adapters_is_small() -> None:
    recipe = adapted(training__freeze_projector=True)
    assert checkpoint_bytes(recipe) == 40_370_176 * (2 + 12)


@pytest.mark.parametrize("fields", [{}, {"lora__quantize_base": "nf4"}])
def test_a_save_copies_adapters_and_their_state_alone(fields: dict[str, object]) -> None:
    recipe = adapted(training__freeze_projector=True, checkpoint__save="runs/adapters", **fields)
    for ranks in (1, 2):
        host = host_memory(recipe, 0, data_parallel=ranks, load=full_pack(recipe))
        assert host.saving == 40_370_176 * (2 + 12) // ranks


@pytest.mark.parametrize("tokens", [32768, 524288])
def test_one_gpu_of_80_gb_has_room_for_half_a_million_tokens(tokens: int) -> None:
    recipe = load_recipe(
        EXAMPLES / "7b" / "lora.yaml", [f"data.seq_length={tokens}", "training.fit_memory=false"]
    )
    room = Room(device=int(H100.memory_gib * GIB), host=125 * GIB)
    assert fit_memory(recipe, room, data_parallel=1, device=H100) is not None


def test_dropout_keeps_a_mask_and_its_result_for_each_input() -> None:
    tokens = 1024
    recipe = adapted(data__seq_length=tokens)
    dropping = recipe.replaced({"lora.dropout": 0.1})
    plain, dropped = (layer_tensors(each) for each in (recipe, dropping))
    inputs = 2 * 3584 + 3584 + 18944  # of qkv and fc1, of the projection, of fc2
    assert dropped.kept("everything") - plain.kept("everything") == 2 * 2 * tokens * inputs
    assert dropped.kept("all_but_mlp") - plain.kept("all_but_mlp") == 2 * 2 * tokens * 2 * 3584
    assert dropped.kept("input_and_attention") == plain.kept("input_and_attention")
    few = dropping.replaced({"lora.targets": ["q_proj", "layers.3.*.down_proj"]})
    kept = layer_tensors(few).kept("everything") - plain.kept("everything")
    assert kept == 2 * 2 * tokens * (3584 + 18944)


def test_levers_are_found_for_adapters_with_dropout() -> None:
    text = {"model.text_only": True, "training.freeze_projector": True}
    recipe = adapted(**{"data__seq_length": 32768}).replaced(text | {"lora.dropout": 0.1})
    for gib in (20, 40, 80, 200):
        room = Room(device=gib * GIB, host=125 * GIB)
        fitted = fit_memory(recipe, room, data_parallel=1, device=H100)
        without = fit_memory(
            recipe.replaced({"lora.dropout": 0.0}), room, data_parallel=1, device=H100
        )
        assert (fitted is None) == (without is None)


def test_the_reference_of_preferences_adds_a_forward_pass_and_the_waiting_packs() -> None:
    lora = adapted(training__freeze_projector=True, training__global_batch_size=6)
    recipe = lora.replaced({"dpo.beta": 0.1})
    lengths, load = [1024, 512], {"tiles": 3, "loss_tokens": 100}
    added = (
        training_flops(recipe, lengths, **load).total - training_flops(lora, lengths, **load).total
    )
    assert added == pack_flops(lora, lengths, **load)
    of_pack = full_pack(recipe).tiles * 3 * 448**2
    hosts = [
        host_memory(each, 0, data_parallel=2, load=full_pack(recipe)).total
        for each in (recipe, lora)
    ]
    assert hosts[0] - hosts[1] == 2 * of_pack
    devices = [
        rank_memory(each, 0, data_parallel=2, load=full_pack(recipe)) for each in (recipe, lora)
    ]
    assert devices[0] == devices[1]


@pytest.mark.parametrize(
    ("changes", "content"),
    [
        ({}, "one document full of tiles, with every eighth token a loss token"),
        ({"dpo.beta": 0.1}, "one pair full of tiles, with every eighth token a loss token"),
        ({"model.text_only": True}, "one document of loss tokens alone"),
        ({"model.text_only": True, "dpo.beta": 0.1}, "one pair of loss tokens alone"),
    ],
)
def test_the_pack_that_stands_for_all_is_told_as_it_is(
    changes: dict[str, object], content: str
) -> None:
    recipe = adapted(training__freeze_projector=True, data__seq_length=1008).replaced(changes)
    assert describe_full_pack(recipe) == content
    load = full_pack(recipe)
    assert load.lengths == ((504, 504) if recipe.dpo.beta else (1008,))
    assert (load.tiles == 0) == (load.loss_tokens == 1008) == recipe.model.text_only


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_stages_share_the_work_of_what_is_trained_and_of_the_reference(beta: float) -> None:
    stages = {"parallel.pipeline_model_parallel_size": 4}
    recipe = adapted(training__freeze_projector=True).replaced(stages | {"dpo.beta": beta})
    language = recipe.model.language
    load = PackLoad(tiles=3, loss_tokens=100)
    lengths = [2048, 1024]
    linear = (2 + (beta > 0)) * linear_flops(language, recipe.data.seq_length)
    layers = linear + (3 + (beta > 0)) * attention_flops(language, lengths)
    first, *inner, last = stage_flops(recipe, load, lengths=lengths)
    assert inner == [layers // 4] * 2
    # Nothing is trained before the language model.
    assert first == layers // 4 + (1 + (beta > 0)) * 3 * tile_flops(recipe.model)
    assert last == layers // 4 + (2 + (beta > 0)) * output_flops(language, 100)


def test_joined_documents_attend_to_the_whole_pack_on_each_stage() -> None:
    stages = {"parallel.pipeline_model_parallel_size": 4, "data.isolate_documents": False}
    recipe = adapted().replaced(stages)
    load = PackLoad(tiles=3, loss_tokens=100)
    whole = stage_flops(recipe, load, lengths=[recipe.data.seq_length])
    assert stage_flops(recipe, load, lengths=[512, 256]) == whole


def test_a_step_of_preferences_takes_one_forward_pass_more() -> None:
    recipe = adapted(
        training__freeze_projector=True, training__recompute_vision=False, data__seq_length=32768
    )
    pairs = recipe.replaced({"dpo.beta": 0.1})
    load = PackLoad(tiles=64, loss_tokens=1000, lengths=(16384, 16384))
    plain, preferred = (step_time(r, H100, data_parallel=1, load=load) for r in (recipe, pairs))
    # Frozen maps are multiplied forward and for the gradients of rows.
    assert preferred.linear == pytest.approx(plain.linear * 3 / 2)
    assert preferred.vision == pytest.approx(plain.vision * 2)
    # The output layer also runs again for the gradients of pairs.
    assert preferred.output == pytest.approx(plain.output * 4 / 2)
    forward = step_time(
        recipe.replaced({"training.recompute_granularity": "full"}),
        H100,
        data_parallel=1,
        load=load,
    )
    assert preferred.attention == pytest.approx(forward.attention)


def test_the_fragment_for_preferences_freezes_the_reference(tmp_path: Path) -> None:
    names = [str(EXAMPLES / name) for name in ("stages/stage3.yaml", "models/7b.yaml", "dpo.yaml")]
    (tmp_path / "own.yaml").write_text(f"base: {json.dumps(names)}\n")
    recipe = load_recipe(tmp_path / "own.yaml", ["parallel.sequence_parallel=false"])
    assert (recipe.dpo.beta, recipe.lora.rank) == (0.1, 16)
    assert trained_parameters(recipe) == whole_adapters(recipe)


def test_dora_has_a_norm_for_each_row_and_keeps_the_outputs() -> None:
    tokens = 1024
    recipe = adapted(data__seq_length=tokens)
    scaled = recipe.replaced({"lora.dora": True})
    outputs = 3584 + 2 * 512 + 3584 + 2 * 18944 + 3584
    assert whole_adapters(scaled) - whole_adapters(recipe) == 28 * outputs
    split = {"parallel.tensor_model_parallel_size": 2}
    added = stage_adapters(scaled.replaced(split), 0) - stage_adapters(recipe.replaced(split), 0)
    assert added == 28 * ((3584 + 2 * 512) // 2 + 3584 + 18944 + 3584)
    kept = [layer_tensors(each).kept("everything") for each in (scaled, recipe)]
    assert kept[0] - kept[1] == 2 * tokens * outputs


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("double_quant", [False, True])
def test_4_bit_maps_of_qwen_7b_take_half_a_byte_and_their_scales(
    tp: int, double_quant: bool
) -> None:
    plain = adapted(parallel__tensor_model_parallel_size=tp)
    packed = plain.replaced({"lora.quantize_base": "nf4", "lora.double_quant": double_quant})
    attention = (3584 + 2 * 512) * 3584 + 3584 * 3584
    elements = 28 * (attention + 3 * 18944 * 3584) // tp
    scales = elements // 64
    if double_quant:
        rows = 28 * ((3584 + 2 * 512) // tp + 3584 + 2 * 18944 // tp + 3584)
        scales = scales // 4 + tp * elements // 64 // 256 + 2 * rows
    saved = 2 * elements - elements // 2 - 4 * scales
    load = full_pack(plain)
    before, after = (rank_memory(each, 0, data_parallel=1, load=load) for each in (plain, packed))
    assert before.weights - after.weights == saved
    assert (after.gradients, after.optimizer) == (before.gradients, before.optimizer)
    # The largest map, of gate and up, is in bf16 while it is multiplied.
    assert after.highest.total <= before.highest.total + 2 * 2 * 18944 * 3584 // tp
    assert weight_bytes(plain, 0) == before.weights


def test_the_log_tells_how_many_parameters_are_in_4_bits() -> None:
    """Of Qwen2.5-7B's 7.62 B, 6.53 B are in linear maps of layers."""
    plain = adapted()
    assert describe_quantization(plain) == ""
    fields = {"lora.quantize_base": "nf4", "lora.double_quant": True}
    told = "6.53 B in 4 bits (nf4, blocks of 64, scales in 8 bits)"
    assert describe_quantization(plain.replaced(fields)) == told


def test_4_bit_maps_lie_on_the_stages_of_their_layers() -> None:
    stages = {"parallel__pipeline_model_parallel_size": 2, "lora__quantize_base": "nf4"}
    recipe = adapted(**stages)
    whole = adapted(lora__quantize_base="nf4")
    assert sum(weight_bytes(recipe, stage) for stage in range(2)) == weight_bytes(whole, 0)


def test_each_product_computes_its_4_bit_weights() -> None:
    load = full_pack(adapted())
    times = [
        step_time(adapted(**fields), H100, data_parallel=1, load=load).elementwise
        for fields in ({}, {"lora__quantize_base": "nf4"})
    ]
    elements = 28 * ((3584 + 2 * 512) * 3584 + 3584 * 3584 + 3 * 18944 * 3584)
    packs = adapted().training.global_batch_size
    per_pass = packs * elements * (2 + 4.5 / 8) / H100.bandwidth
    assert 2 * per_pass <= 1.01 * (times[1] - times[0]) <= 4 * per_pass


@pytest.mark.parametrize(
    "kind",
    [
        {"lora__dora": True, "lora__targets": ["*"]},
        {"lora__quantize_base": "nf4"},
        {"dpo__beta": 0.1},
    ],
)
def test_a_dry_run_builds_the_adapters_that_it_counts(kind: dict[str, object]) -> None:
    # In a process of its own: a dry run makes a world.
    name = check_adapters_of_a_dry_run.__name__
    ended = run_program("-c", f"from {__name__} import {name}; {name}({kind!r})")
    assert ended.returncode == 0, ended.stderr


def check_adapters_of_a_dry_run(kind: dict[str, object]) -> None:
    recipe = adapted(
        **kind,
        model__language__num_layers=4,
        parallel__tensor_model_parallel_size=2,
        parallel__pipeline_model_parallel_size=2,
        training__freeze_vision_model=True,
        training__freeze_projector=True,
    )
    report = dry_run(recipe, world_size=4, with_data=False)
    counts = [stage.parameters.adapters for stage in report.stages]
    assert counts == [stage_adapters(recipe, stage) for stage in range(2)]
    assert min(counts) > 0
    lengths = (2048, 2048) if recipe.dpo.beta else (4096,)
    load = full_pack(recipe)
    flops = training_flops(recipe, lengths, tiles=load.tiles, loss_tokens=load.loss_tokens).total
    packs = recipe.training.global_batch_size
    assert report.prediction.flops == packs * flops
    assert sum(stage.flops for stage in report.stages) == pytest.approx(flops, rel=1e-9)
    assumed = "one pair full of tiles" if recipe.dpo.beta else "one document full of tiles"
    text = describe(recipe, report, ranks_per_node=8)
    assert f"packs: not read; taken to be {assumed}" in text
    packed = "of the layers' parameters, 932.18 M in 4 bits (nf4, blocks of 64)"
    assert (packed in text) == recipe.lora.quantizes
