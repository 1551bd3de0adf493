"""Bytes of weights on a rank, where frozen linear maps are kept in 4 bits (QLoRA)."""

from functools import lru_cache

from megatron_vita.config import LinearMap, ModelConfig, Recipe, linear_maps
from megatron_vita.config.groups.lora import SCALES_AT_ONCE
from megatron_vita.costs.memory.layer_memory import value_bytes
from megatron_vita.costs.memory.parameters import stage_parameters
from megatron_vita.rounding import ceil_div


def weight_bytes(recipe: Recipe, stage: int) -> int:
    """Return the bytes of all weights on one rank of pipeline stage `stage`."""
    total = stage_parameters(recipe, stage).total * value_bytes(recipe)
    if not recipe.lora.quantizes:
        return total
    layers = recipe.parallel.layers_of_stages(recipe.model.language.num_layers)[stage]
    saved = sum(
        _elements(linear, recipe) * value_bytes(recipe) - packed_bytes(linear, recipe)
        for linear in _maps_of_a_layer(recipe.model)
    )
    return total - layers * saved


def quantized_parameters(recipe: Recipe) -> int:
    """Count the whole model's parameters that are kept in 4 bits."""
    if not recipe.lora.quantizes:
        return 0
    of_layer = sum(linear.inputs * linear.outputs for linear in _maps_of_a_layer(recipe.model))
    return recipe.model.language.num_layers * of_layer


def packed_bytes(linear: LinearMap, recipe: Recipe) -> int:
    """Return the bytes of a map's weight in 4 bits on one rank: codes and scales."""
    lora = recipe.lora
    elements = _elements(linear, recipe)
    scales = elements // lora.quantize_block_size
    if not lora.double_quant:
        return elements // 2 + 4 * scales
    rows = linear.outputs
    if linear.split == "column":
        rows //= recipe.parallel.tensor_model_parallel_size
    of_row = linear.inputs // lora.quantize_block_size
    second = sum(ceil_div(piece.outputs * of_row, SCALES_AT_ONCE) for piece in linear.pieces)
    # The second scales of all ranks, and of each row its mean and the place of its first scale.
    return elements // 2 + scales + 4 * second + 8 * rows


def dense_bytes(recipe: Recipe) -> int:
    """Return the bytes of the largest map's weight while it is multiplied; 0 without 4-bit maps."""
    if not recipe.lora.quantizes:
        return 0
    most = max(_elements(linear, recipe) for linear in _maps_of_a_layer(recipe.model))
    return most * value_bytes(recipe)


# Costs are computed by the thousand where levers that fit are looked for.
@lru_cache(maxsize=16)
def _maps_of_a_layer(model: ModelConfig) -> tuple[LinearMap, ...]:
    """Return the maps of one layer of the language model; all layers are alike."""
    return tuple(linear for linear in linear_maps(model) if linear.layer == 0)


def _elements(linear: LinearMap, recipe: Recipe) -> int:
    return linear.inputs * linear.outputs // recipe.parallel.tensor_model_parallel_size
