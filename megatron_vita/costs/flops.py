"""Forward FLOPs of matrix products, before any split over ranks.

Attention is causal and inside documents, as Megatron-LM counts it; a training step without
recomputation takes three times the forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vita.config import LanguageConfig, ModelConfig, Recipe, VisionConfig
from megatron_vita.costs.memory.parameters import language_layer, word_embedding
from megatron_vita.rounding import round_up


def linear_flops(language: LanguageConfig, tokens: int) -> int:
    """Count the FLOPs of all layers' linear maps."""
    return 2 * tokens * language.num_layers * language_layer(language).split


def attention_flops(language: LanguageConfig, lengths: Sequence[int] | np.ndarray) -> int:
    """Count the FLOPs of all layers' attention in documents of `lengths` tokens (half the square
    each)."""
    # Causal: half of the two products of n x n scores with d channels, 2 FLOPs each.
    squares = int(np.square(np.asarray(lengths, dtype=np.int64)).sum())
    return 2 * squares * language.num_layers * language.num_attention_heads * language.kv_channels


def output_flops(language: LanguageConfig, loss_tokens: int) -> int:
    """Count the FLOPs of the output layer for `loss_tokens` loss tokens."""
    return 2 * loss_tokens * word_embedding(language)


def tile_flops(model: ModelConfig) -> int:
    """Count the FLOPs of tower and projector for one tile."""
    return tower_flops(model.vision) + projector_flops(model)


def projector_flops(model: ModelConfig) -> int:
    """Count the FLOPs of the projector for one tile."""
    vision = model.vision
    language = model.language
    hidden = model.projector_hidden_size
    return 2 * vision.image_token_length * hidden * (4 * vision.hidden_size + language.hidden_size)


def tower_flops(vision: VisionConfig) -> int:
    """Count the FLOPs of the vision tower for one tile."""
    width = vision.hidden_size
    tokens = vision.tokens
    linear = 2 * tokens * (4 * width * width + 2 * width * vision.ffn_hidden_size)
    patches = 2 * vision.patches * 3 * vision.patch_size**2 * width
    return vision.num_layers * (linear + tower_attention_flops(vision)) + patches


def tower_attention_flops(vision: VisionConfig) -> int:
    """Count the FLOPs of one tower layer's attention for one tile; every patch attends to all."""
    return 4 * vision.tokens**2 * vision.hidden_size


def variable_cost(recipe: Recipe, lengths: Sequence[int] | np.ndarray, *, tiles: int) -> int:
    """Count the FLOPs of a pack that depend on its content, on the first pipeline stage.

    Attention inside its documents of `lengths` tokens, and its tiles; forward and backward, and
    through the reference of pairs.
    """
    # Padding inside a document is attended to as well, and so counts here.
    alignment = recipe.data.document_alignment
    padded = round_up(np.asarray(lengths, dtype=np.int64), alignment)
    of_square, of_tile = cost_weights(recipe)
    return of_square * int(np.square(padded).sum()) + of_tile * tiles


def cost_weights(recipe: Recipe) -> tuple[int, int]:
    """Return the coefficients of `variable_cost`: FLOPs by squared padded length, and by tile."""
    attention, vision = forward_weights(recipe)
    reference = reference_passes(recipe)
    # All tiles are encoded on the first stage, which runs a part of the layers.
    of_tile = (_tower_passes(recipe) + reference) * vision
    of_square = (3 + reference) * attention // recipe.parallel.pipeline_model_parallel_size
    return of_square, of_tile


def reference_passes(recipe: Recipe) -> int:
    """Return the passes through the reference of pairs of answers."""
    return 1 if recipe.dpo.beta else 0


def _tower_passes(recipe: Recipe) -> int:
    """Return the tower's FLOPs over those of its forward; nothing before it is trained."""
    if recipe.is_frozen("vision_model"):
        return 1
    # Weights beside adapters need no gradients of their own.
    if recipe.training.freeze_vision_model:
        return 2
    return 3


def forward_weights(recipe: Recipe) -> tuple[int, int]:
    """Return the coefficients of the forward pass over all stages, which depend on the model
    alone."""
    attention = 0
    vision = 0
    # Joined documents are one segment of the same length in all packs: a constant cost.
    if recipe.data.isolate_documents:
        attention = attention_flops(recipe.model.language, [1])
    # A pair is two segments, each of about half its length, with half the square in all.
    if recipe.dpo.beta:
        attention //= 2
    if not recipe.model.text_only:
        vision = tile_flops(recipe.model)
    return attention, vision


def pack_flops(recipe: Recipe, lengths: Sequence[int], *, tiles: int, loss_tokens: int) -> int:
    """Count a pack's model FLOPs, forward, without padding of documents or pack."""
    language = recipe.model.language
    flops = linear_flops(language, sum(lengths)) + output_flops(language, loss_tokens)
    flops += attention_flops(language, _segments(recipe, lengths))
    if not recipe.model.text_only:
        flops += tiles * tile_flops(recipe.model)
    return flops


def _segments(recipe: Recipe, lengths: Sequence[int]) -> Sequence[int]:
    """Return the lengths inside which a recipe's attention stays."""
    if recipe.data.isolate_documents:
        return lengths
    return [sum(lengths)]


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Model FLOPs of training on a pack, by part."""

    linear: int  # of the language model's layers
    attention: int
    output: int
    vision: int  # tower and projector

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.linear + self.attention + self.output + self.vision


def training_flops(
    recipe: Recipe, lengths: Sequence[int], *, tiles: int, loss_tokens: int
) -> TrainingFlops:
    """Count the model FLOPs of training on a pack: three times the forward for trained weights.

    Frozen weights need no gradients of their own (twice the forward), and a frozen tower has no
    backward. Pairs of answers (`dpo.beta`) also go forward through the reference.
    """
    language = recipe.model.language
    training = recipe.training
    # Gradients go through a frozen language model to what is before it.
    passes = 3
    if training.freeze_language_model:
        passes = 2
    reference = reference_passes(recipe)
    vision = 0
    if not recipe.model.text_only:
        tower = _tower_passes(recipe)
        joint = 3
        if training.freeze_projector:
            before = recipe.is_frozen("vision_model") and recipe.is_frozen("projector")
            joint = 1 if before else 2
        vision = tower * tower_flops(recipe.model.vision) + joint * projector_flops(recipe.model)
        vision += reference * tile_flops(recipe.model)
    return TrainingFlops(
        linear=(passes + reference) * linear_flops(language, sum(lengths)),
        attention=(3 + reference) * attention_flops(language, _segments(recipe, lengths)),
        output=(passes + reference) * output_flops(language, loss_tokens),
        vision=tiles * vision,
    )
