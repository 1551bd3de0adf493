"""First weights are the same numbers at every layout, whatever TP, PP, VPP, CP and its padding of
the vocabulary."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import find_checkpoint, load_weights
from megatron_vita.model import initial_weights
from megatron_vita.model.build import build_chunks
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from tests.functional.launch import MOST_PROCESSES, run_ranks
from tests.functional.synthetic import tiny_recipe

BLOCK = 300
"""Numbers drawn together: matrices of the tiny model are of several blocks, whose bounds are not those of shards."""

ODD = {"vocab_size": 97}  # which two ranks pad
TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
UNEVEN = PP | {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}
TIED = {"untie_embeddings_and_output_weights": False}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "tp2": (2, TP),
    "tp2-together": (2, TP | {"sequence_parallel": True, "vision_tensor_parallel": True}),
    "pp2": (2, PP),
    "pp2-uneven": (2, UNEVEN),
    "pp2-vpp2": (2, VPP),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (4, TP | PP),
    "tp2-pp2-tied": (4, TP | PP | TIED),
    "tp2-vpp2-qwen3": (4, TP | VPP | {"qk_layernorm": True, "add_qkv_bias": False}),
}
LAYOUTS = {name: (world, f) for name, (world, f) in LAYOUTS.items() if world <= MOST_PROCESSES}
NOT_PARALLEL = ("untie_embeddings_and_output_weights", "qk_layernorm", "add_qkv_bias")


def build(fields: dict) -> list[VitaModel]:
    """Build this rank's chunks of the tiny model at a layout."""
    initial_weights.BLOCK = BLOCK
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    return build_chunks(recipe)


def write_checkpoints(folder: Path, layouts: dict[str, dict]) -> None:
    """Write the initial weights of each layout, given as fields of the recipe."""
    for name, fields in layouts.items():
        state = {"model": store.model_state(build(fields))}
        store.save_checkpoint(folder / name, step=0, state=state, manifest={}, keep=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of initial weights for each layout."""
    folder = tmp_path_factory.mktemp("first")
    for world in sorted({world for world, _ in LAYOUTS.values()}):
        fields = {name: f | ODD for name, (ranks, f) in LAYOUTS.items() if ranks == world}
        run_ranks(write_checkpoints, world, folder, fields)
    return folder


@pytest.fixture(autouse=True)
def usual_blocks() -> Iterator[None]:
    """Undo what `build` sets."""
    before = initial_weights.BLOCK
    yield
    initial_weights.BLOCK = before


def single(**fields: object) -> dict[str, torch.Tensor]:
    """First weights of one process."""
    platform.initialize_process()
    (model,) = build(ODD | fields)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_the_same_at_every_layout(written: Path, layout: str) -> None:
    kept = {name: v for name, v in LAYOUTS[layout][1].items() if name in NOT_PARALLEL}
    expected = single(**kept)
    (reader,) = build(ODD | kept | {"seed": 99})
    load_weights([reader], find_checkpoint(written / layout))
    found = dict(reader.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_matrices_have_the_deviation_of_the_recipe_and_the_rest_is_plain() -> None:
    weights = single(vocab_size=4000, hidden_size=64, ffn_hidden_size=512, init_method_std=0.5)
    scaled = 0.5 / (2 * 4) ** 0.5  # four layers, each with two residual branches
    layer = "language_model.decoder.layers.3."
    deviations = {
        "language_model.embedding.word_embeddings.weight": 0.5,
        "language_model.output_layer.weight": 0.5,
        f"{layer}mlp.linear_fc1.weight": 0.5,
        f"{layer}mlp.linear_fc2.weight": scaled,
        f"{layer}self_attention.linear_proj.weight": scaled,
    }
    for name, deviation in deviations.items():
        assert weights[name].std().item() == pytest.approx(deviation, rel=0.03)
        assert weights[name].mean().item() == pytest.approx(0, abs=0.05 * deviation)
    assert not weights[f"{layer}self_attention.linear_qkv.bias"].any()
    assert (weights["language_model.decoder.final_layernorm.weight"] == 1).all()


def test_no_two_matrices_and_no_two_blocks_are_alike() -> None:
    weights = single(hidden_size=32)
    rows: list[tuple] = []
    for name, weight in weights.items():
        if name.startswith("language_model.") and weight.dim() == 2:
            rows += [tuple(row) for row in weight[:, :8].tolist()]
    assert len(set(rows)) == len(rows)
    other = single(hidden_size=32, seed=4321)
    name = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(weights[name], other[name])


def test_a_language_model_alone_begins_as_inside_a_whole_one() -> None:
    whole = single()
    alone = single(text_only=True)
    assert all(torch.equal(weight, whole[name]) for name, weight in alone.items())
