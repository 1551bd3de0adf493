"""Bytes that a checkpoint takes on disk, from a recipe alone."""

from megatron_vita.config import Recipe
from megatron_vita.costs.memory.layer_memory import value_bytes
from megatron_vita.costs.memory.parameters import model_parameters, trained_parameters

FULL_STATE = 12
"""Weights in fp32 and two moments in fp32, of a trained parameter."""
MOMENTS = 8


def written_state_bytes(recipe: Recipe) -> int:
    """Bytes of a trained parameter's optimizer state in a checkpoint."""
    if recipe.parallel.use_distributed_optimizer or recipe.training.bf16:
        return FULL_STATE
    return MOMENTS  # the weights are the model's own


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint's tensors, whatever the layout. The tokenizer's copy and the metadata,
    some megabytes, are not counted."""
    weights = model_parameters(recipe.model)
    # Beside adapters, what is frozen is left out.
    if recipe.lora.rank:
        weights = trained_parameters(recipe)
    return weights * value_bytes(recipe) + trained_parameters(recipe) * written_state_bytes(recipe)
