"""Frozen linear maps of the language model with weights of 4 bits (QLoRA).

They take the place of a backend's linear layers. A weight exists in its own type only while its
layer is initialized or loaded (`unpacked_in_turn`). Afterwards each product computes it anew,
forward and backward, and nothing keeps it in between.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_vita import platform
from megatron_vita.config import Recipe, linear_maps
from megatron_vita.errors import PlatformError
from megatron_vita.model.lora import named_linears
from megatron_vita.model.nf4 import PackedWeight, Packing, pack
from megatron_vita.parallel import groups


class QuantizedLinear(nn.Module):
    """A linear map whose weight is packed; the base of both parallel kinds."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    packing: Packing
    packed: PackedWeight | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.weight is not None
        self.shape = self.weight.shape
        self._dtype = self.weight.dtype
        # At once, so that a model never has more than one of them.
        self.weight = None

    def unpack(self) -> None:
        """Make room for the weight in its own type, to be written to."""
        self.packed = None
        weight = torch.empty(self.shape, dtype=self._dtype, device=platform.device())
        self.weight = nn.Parameter(weight, requires_grad=False)

    def pack(self) -> None:
        """Keep the weight in 4 bits. Collective with double quantization."""
        assert self.weight is not None
        self.packed = pack(self.weight.detach(), self.packing)
        self.weight = None

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply rows [..., in] by the weight, without communication: [..., out]."""
        assert self.packed is not None, "the weight is packed before any product"
        product: Tensor = _Product.apply(rows, self.packed)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return torch.matmul(rows, weight.dense().t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.matmul(grads[0], ctx.weight.dense()), None


class QuantizedColumnLinear(QuantizedLinear, ColumnParallelLinear):
    """Column-parallel map: its outputs are split over TP."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Map rows [s, b, in] to [t, b, out / TP]; under sequence parallelism s is t / TP."""
        assert not self.gather_output, "no layer asks for it"
        if self.sequence_parallel:
            rows = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            rows = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        product = self.multiply(rows)
        if self.bias is not None:
            product = product + self.bias
        return product, None


class QuantizedRowLinear(QuantizedLinear, RowParallelLinear):
    """Row-parallel map: its inputs are split over TP."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Map rows [t, b, in / TP] to [s, b, out]; under sequence parallelism s is t / TP."""
        assert self.input_is_parallel, "layers split their inputs"
        assert self.bias is None, "outputs of projections have no bias to be added"
        product = self.multiply(input_)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(product, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(product, group=self.tp_group), None


def use_quantized_linears(
    spec: ModuleSpec | TransformerBlockSubmodules,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Replace the linear layers of any backend's specification, in place.

    Its norms must be modules of their own, as they are beside adapters.
    """
    layers = [spec]
    if isinstance(spec, TransformerBlockSubmodules):
        layers = spec.layer_specs
    for layer in layers:
        attention = layer.submodules.self_attention.submodules
        attention.linear_qkv = QuantizedColumnLinear
        attention.linear_proj = QuantizedRowLinear
        mlp = layer.submodules.mlp
        linears = dataclasses.replace(
            mlp.keywords["submodules"],
            linear_fc1=QuantizedColumnLinear,
            linear_fc2=QuantizedRowLinear,
        )
        layer.submodules.mlp = functools.partial(mlp.func, submodules=linears)
    return spec


def check_quantization(recipe: Recipe) -> None:
    """Check that this machine supports 4-bit weights, if the recipe has them.

    Raises:
        PlatformError: bitsandbytes is missing.
    """
    lora = recipe.lora
    if lora.quantizes and not platform.has_bitsandbytes():
        raise PlatformError(
            f"lora.quantize_base is {lora.quantize_base}, but bitsandbytes is not installed: "
            "pip install 'megatron-vita[qlora]', or set it to none"
        )


def set_packing(model: nn.Module, recipe: Recipe) -> None:
    """Tell a model chunk's quantized maps how their weights are packed."""
    maps = {linear.name: linear for linear in linear_maps(recipe.model)}
    for name, module in named_linears(model):
        if isinstance(module, QuantizedLinear):
            module.packing = Packing(
                linear=maps[name],
                block_size=recipe.lora.quantize_block_size,
                double_quant=recipe.lora.double_quant,
                group=groups.tensor_group(),
            )


def quantized_linears(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the quantized maps of a module with their names in it."""
    for name, linear in module.named_modules():
        if isinstance(linear, QuantizedLinear):
            yield name, linear


def unpacked_in_turn(model: Any) -> Iterator[set[str]]:
    """Make room for the quantized weights of one layer after another, and yield their names.

    What is written to them is packed when the next one is asked for. Collective with double
    quantization.
    """
    of_layers: dict[str, list[tuple[str, QuantizedLinear]]] = {}
    for name, linear in quantized_linears(model):
        layer = name.partition(".layers.")[2].partition(".")[0]
        of_layers.setdefault(layer, []).append((name, linear))
    for linears in of_layers.values():
        for _, linear in linears:
            linear.unpack()
        yield {f"{name}.weight" for name, _ in linears}
        for _, linear in linears:
            linear.pack()


def packed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that quantized maps keep in the place of their weights, by name."""
    for name, linear in quantized_linears(model):
        if linear.packed is not None:
            for kind, tensor in linear.packed.tensors().items():
                yield f"{name}.weight ({kind})", tensor


def parameter_count(model: nn.Module) -> int:
    """Count a model chunk's parameters, packed ones too."""
    packed = sum(linear.shape.numel() for _, linear in quantized_linears(model))
    return packed + sum(parameter.numel() for parameter in model.parameters())
