"""Bytes that vision tower and projector keep and take on the rank with the most tiles."""

from megatron_vita.config import Recipe, VisionConfig
from megatron_vita.costs.layer_memory import value_bytes


def tiles_of_rank(recipe: Recipe, tiles: int) -> int:
    """Most tiles of a pack that one rank encodes."""
    return -(-tiles // recipe.parallel.tile_ranks)


def vision_kept(recipe: Recipe, tiles: int) -> int:
    """Bytes that stay from a pack's encoding to the end of its backward.

    Of each tile: normalised pixels (3 S^2 values), a layer's tensors or its input for each layer,
    and the projector's input, normed input and hidden values. Nothing where all is frozen; a
    frozen tower keeps only what the projector needs.
    """
    vision, training = recipe.model.vision, recipe.training
    if training.freeze_vision_model and training.freeze_projector:
        return 0
    values = vision.image_token_length * (8 * vision.hidden_size + 2 * _projector_width(recipe))
    if not training.freeze_vision_model:
        layer = vision.hidden_size if training.recompute_vision else _layer_kept(recipe)
        values += vision.num_layers * vision.tokens * layer + 3 * vision.image_size**2
    return tiles_of_rank(recipe, tiles) * values * value_bytes(recipe)


def vision_working(recipe: Recipe, tiles: int) -> int:
    """Most bytes beside those, in the backward of a layer; in its forward where the tower is
    frozen. `vision_tiles_at_once` bounds the tiles that are in a layer together."""
    at_once = min(tiles_of_rank(recipe, tiles), recipe.training.vision_tiles_at_once)
    vision = recipe.model.vision
    width, wide = vision.hidden_size, vision.ffn_hidden_size // _split(recipe)
    if recipe.training.freeze_vision_model:
        values = 2 * width + 2 * wide  # residual stream, norm's output, both sides of the MLP
    else:
        # gradients of the stream, of the scaled branch and of both sides of the MLP, meeting what
        # recomputation brought back
        values = 2 * width + 2 * wide
        values += _layer_kept(recipe) if recipe.training.recompute_vision else 0
    return at_once * vision.tokens * values * value_bytes(recipe)


def _layer_kept(recipe: Recipe) -> int:
    """Values that a layer without recomputation keeps for each patch.

    Inputs and outputs of two norms and inputs of two LayerScales: 6 H; queries, keys, values and
    attention's output: 4 H; both sides of the MLP's activation: 2 F. RMSNorm of queries and keys
    keeps them in fp32 and once more: 6 H. 18 H at InternViT-300M's F = 4 H: with the projector
    0.86 GiB a tile were measured.
    """
    vision: VisionConfig = recipe.model.vision
    inner = 4 * vision.hidden_size + 2 * vision.ffn_hidden_size
    inner += 6 * vision.hidden_size if vision.qk_layernorm else 0
    return 6 * vision.hidden_size + inner // _split(recipe)


def _split(recipe: Recipe) -> int:
    """Ranks that share the inner width of the tower's layers."""
    parallel = recipe.parallel
    return parallel.tensor_model_parallel_size if parallel.vision_tensor_parallel else 1


def _projector_width(recipe: Recipe) -> int:
    model = recipe.model
    if model.projector.kind == "internvl":
        return model.language.hidden_size
    return model.vision.hidden_size
