"""Linear maps of 4 bits: their values, their memory, and their place in a model."""

import gc
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import LinearMap, linear_maps
from megatron_vita.costs.memory.quantized import packed_bytes
from megatron_vita.errors import PlatformError
from megatron_vita.model.backends.backends import TorchBackend
from megatron_vita.model.build import build_model
from megatron_vita.model.lora import row_owners
from megatron_vita.model.nf4 import Packing, pack
from megatron_vita.model.projection import without_output
from megatron_vita.model.quantized import quantized_linears, unpacked_in_turn
from megatron_vita.parallel import groups
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import my_batches
from tests.functional.synthetic import QUANTIZED, tiny_recipe
from tests.model.live_bytes import LiveBytes


def open_run(**fields: object) -> Run:
    platform.initialize_process()
    recipe = tiny_recipe(**{**QUANTIZED, **fields})
    groups.initialize_groups(recipe.parallel)
    return assemble_run(recipe)


def maps_of_a_layer() -> list[LinearMap]:
    """Maps of which some rows have scales with two second scales, on each of two ranks too."""
    platform.initialize_process()
    recipe = tiny_recipe(hidden_size=192, kv_channels=48, ffn_hidden_size=384)
    groups.initialize_groups(recipe.parallel)
    return [each for each in linear_maps(recipe.model) if each.layer == 0]


def random_weight(linear: LinearMap) -> Tensor:
    generator = torch.Generator().manual_seed(linear.inputs + linear.outputs)
    return torch.randn(linear.outputs, linear.inputs, generator=generator)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_single_map_has_the_values_of_bitsandbytes(
    double_quant: bool, dtype: torch.dtype
) -> None:
    for linear in maps_of_a_layer():
        weight = random_weight(linear).to(dtype)
        packing = Packing(
            linear=linear, block_size=32, double_quant=double_quant, group=groups.tensor_group()
        )
        dense = pack(weight, packing).dense()
        owners = row_owners(linear).flatten()
        for number in range(len(linear.pieces)):
            mine = owners == number
            codes, state = quantize_4bit(
                weight[mine], blocksize=32, compress_statistics=double_quant, quant_type="nf4"
            )
            assert torch.equal(dense[mine], dequantize_4bit(codes, state)), linear.name


@dataclass(frozen=True)
class RankOfTwo:
    """A tensor-parallel group of two as one of its ranks sees it, without the other."""

    number: int

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return self.number


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_shard_has_the_values_of_the_whole_weight(
    double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for linear in maps_of_a_layer():
        weight = random_weight(linear)
        alone = Packing(
            linear=linear, block_size=32, double_quant=double_quant, group=groups.tensor_group()
        )
        whole = pack(weight, alone).dense()
        shards = [part.contiguous() for part in halves(weight, linear)]
        plain = replace(alone, double_quant=False)
        scales = [pack(shard, plain).scales.values() for shard in shards]

        def gather(
            into: list[Tensor], own: Tensor, *, group: RankOfTwo, all_: Any = scales
        ) -> None:
            assert torch.equal(own.flatten(), all_[group.rank()].flatten())
            for place, part in zip(into, all_, strict=True):
                place.copy_(part.view_as(place))

        monkeypatch.setattr(dist, "all_gather", gather)
        for rank, expected in enumerate(halves(whole, linear)):
            packing = replace(alone, group=cast(dist.ProcessGroup, RankOfTwo(rank)))
            assert torch.equal(pack(shards[rank], packing).dense(), expected), linear.name
        monkeypatch.undo()


def halves(weight: Tensor, linear: LinearMap) -> list[Tensor]:
    """The parts of two TP ranks; split pieces of a map lie one after another."""
    if linear.split == "row":
        return list(weight.chunk(2, dim=1))
    stacked = weight.view(len(row_owners(linear)), -1, linear.inputs)
    return [part.flatten(0, 1) for part in stacked.chunk(2, dim=1)]


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    run = open_run(targets=["q_proj"])
    linear = dict(quantized_linears(run.unwrapped_model))[
        "language_model.decoder.layers.0.mlp.linear_fc1"
    ]
    assert linear.packed is not None
    dense = linear.packed.dense()
    rows = torch.randn(3, 1, dense.shape[1], requires_grad=True)
    with LiveBytes([rows, *linear.packed.tensors().values()]) as live:
        product, _ = linear(rows)
        gc.collect()
        assert live.count() == product.nbytes
        grad = torch.randn(product.shape)
        (found,) = torch.autograd.grad(product, [rows], grad)
    torch.testing.assert_close(product, rows @ dense.t())
    torch.testing.assert_close(found, grad @ dense)


def test_a_projection_without_output_has_the_gradient_of_the_4_bit_weight() -> None:
    run = open_run()
    linear = dict(quantized_linears(run.unwrapped_model))[
        "language_model.decoder.layers.0.mlp.linear_fc2"
    ]
    assert linear.packed is not None
    dense = linear.packed.dense()
    rows = torch.randn(5, 1, dense.shape[1], requires_grad=True)
    grad = torch.randn(5, 1, len(dense))
    result = without_output(rows, linear, group=None)
    (found,) = torch.autograd.grad(result, [rows], grad)
    torch.testing.assert_close(found, grad @ dense)


def test_only_maps_of_the_language_model_are_packed_and_training_leaves_them_as_they_are() -> None:
    run = open_run(double_quant=True, targets=["*"])
    packed = {name for name, _ in quantized_linears(run.unwrapped_model)}
    assert packed == {
        f"language_model.decoder.layers.{layer}.{name}"
        for layer in range(4)
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    }
    before = {name: tensor.clone() for name, tensor in run.named_weights()}
    assert len(before) == len(list(run.named_parameters())) + 5 * len(packed)
    for step in range(2):
        train_step(run, iter(my_batches(run, step)))
    for name, tensor in run.named_weights():
        assert torch.equal(tensor, before[name]) == (".lora." not in name), name


class OneLayerForAll(TorchBackend):
    """A backend that specifies one layer for all of them, as those of Transformer Engine do."""

    def block_spec(self, num_layers: int, *, qk_layernorm: bool) -> ModuleSpec:
        """Return the layer."""
        return super().block_spec(1, qk_layernorm=qk_layernorm).layer_specs[0]


def test_the_maps_of_a_backend_that_specifies_one_layer_are_packed() -> None:
    platform.initialize_process()
    recipe = tiny_recipe(**QUANTIZED)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe, backend=OneLayerForAll())
    assert len(list(quantized_linears(model))) == 4 * 4
    weights = [name for name, _ in model.named_parameters() if ".linear_" in name]
    assert not any(name.endswith(".weight") for name in weights)


@pytest.mark.parametrize("double_quant", [False, True])
def test_4_bit_weights_take_the_bytes_that_costs_count(double_quant: bool) -> None:
    run = open_run(double_quant=double_quant)
    taken = {
        name: sum(tensor.nbytes for tensor in linear.packed.tensors().values())
        for name, linear in quantized_linears(run.unwrapped_model)
        if linear.packed is not None
    }
    maps = [each for each in linear_maps(run.recipe.model) if each.part == "language_model"]
    assert taken == {linear.name: packed_bytes(linear, run.recipe) for linear in maps}


def test_weights_of_one_layer_alone_are_in_memory_while_a_model_is_filled() -> None:
    run = open_run()
    model = run.unwrapped_model
    for number, names in enumerate(unpacked_in_turn(model)):
        assert names == {
            f"{name}.weight" for name, _ in quantized_linears(model) if f".layers.{number}." in name
        }
        whole = {name for name, _ in model.named_parameters() if name.endswith("weight")}
        assert {name for name in whole if ".linear_" in name and ".lora." not in name} == names
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).fill_(number)
    for name, linear in quantized_linears(model):
        assert linear.packed is not None
        number = int(name.split(".")[3])
        assert torch.equal(linear.packed.dense(), torch.full(linear.shape, float(number)))


def test_a_machine_without_bitsandbytes_is_told_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "has_bitsandbytes", lambda: False)
    with pytest.raises(PlatformError, match=r"bitsandbytes is not installed: pip install .*qlora"):
        open_run()
    open_run(quantize_base="none", quantize_block_size=64)
