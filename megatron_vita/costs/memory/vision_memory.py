"""Device memory of vision tower and projector, on the rank with the most tiles."""

from megatron_vita.config import Recipe, VisionConfig
from megatron_vita.costs.memory.adapters import part_adapters
from megatron_vita.costs.memory.layer_memory import value_bytes
from megatron_vita.costs.memory.parameters import stage_parameters
from megatron_vita.rounding import ceil_div


def tiles_of_rank(recipe: Recipe, tiles: int) -> int:
    """Return the most tiles of a pack that one rank encodes."""
    return ceil_div(tiles, recipe.parallel.tile_ranks)


def vision_kept(recipe: Recipe, tiles: int) -> int:
    """Return the bytes kept from a pack's encoding to the end of its backward.

    Nothing where all is frozen.
    """
    training = recipe.training
    if recipe.is_frozen("vision_model") and recipe.is_frozen("projector"):
        return 0
    values = _kept_of_tile(recipe, layer=_layer_kept(recipe))
    if _from_pixels(recipe):
        values = 3 * recipe.model.vision.image_size**2
    elif training.recompute_vision:
        values = _kept_of_tile(recipe, layer=recipe.model.vision.hidden_size)
    return tiles_of_rank(recipe, tiles) * values * value_bytes(recipe)


def vision_working(recipe: Recipe, tiles: int) -> int:
    """Return the peak bytes of a layer's backward, beside what is kept; of its forward if frozen.

    `vision_tiles_at_once` bounds the tiles that are in a layer together.
    """
    at_once = min(tiles_of_rank(recipe, tiles), recipe.training.vision_tiles_at_once)
    vision = recipe.model.vision
    # Gradients of the stream, of the scaled branch and of both sides of the MLP; in a forward
    # without backward: the stream, the norm's output and both sides of the MLP.
    values = 2 * vision.hidden_size + 2 * vision.ffn_hidden_size // _split(recipe)
    recomputed = 0
    sums = 0
    if _from_pixels(recipe):
        # Weight gradients of one batch of tiles, and their fp32 sums over several.
        recomputed = _kept_of_tile(recipe, layer=_layer_kept(recipe))
        if at_once < tiles_of_rank(recipe, tiles):
            sums = _trained(recipe) * 4
        sums += _trained(recipe) * value_bytes(recipe)
    elif recipe.training.recompute_vision and not recipe.is_frozen("vision_model"):
        recomputed = vision.tokens * _layer_kept(recipe)
    return at_once * (vision.tokens * values + recomputed) * value_bytes(recipe) + sums


def _from_pixels(recipe: Recipe) -> bool:
    """Tell whether tiles are encoded again in backward from their pixels, nothing else being
    kept."""
    training = recipe.training
    return training.recompute_vision and training.recompute_vision_method == "tiles"


def _trained(recipe: Recipe) -> int:
    """Count the trained parameters of tower and projector on one rank."""
    parameters = stage_parameters(recipe, 0)
    trained = part_adapters(recipe, "vision_model") + part_adapters(recipe, "projector")
    if not recipe.training.freeze_vision_model:
        trained += parameters.vision
    if not recipe.training.freeze_projector:
        trained += parameters.projector
    return trained


def _kept_of_tile(recipe: Recipe, *, layer: int) -> int:
    """Count the values of a tile that are kept, where each layer keeps `layer` values of a patch.

    Normalized pixels (3 S^2), the layers' tensors, and the projector's input, normed input and
    hidden values (4 H + 4 H + 2 widths of each feature row). A frozen tower keeps none of the first
    two.
    """
    model = recipe.model
    hidden = model.projector_hidden_size
    vision = model.vision
    values = vision.image_token_length * (8 * vision.hidden_size + 2 * hidden)
    if recipe.is_frozen("vision_model"):
        return values
    return values + vision.num_layers * vision.tokens * layer + 3 * vision.image_size**2


def _layer_kept(recipe: Recipe) -> int:
    """Count the values that a layer without recomputation keeps for each patch.

    Inputs and outputs of two norms and inputs of two LayerScales: 6 H; queries, keys, values and
    attention's output: 4 H; both sides of the MLP's activation: 2 F. RMSNorm of queries and keys
    keeps them in fp32 and once more: 6 H. 18 H at InternViT-300M's F = 4 H: with the projector 0.86
    GiB a tile were measured.
    """
    vision: VisionConfig = recipe.model.vision
    inner = 4 * vision.hidden_size + 2 * vision.ffn_hidden_size
    if vision.qk_layernorm:
        inner += 6 * vision.hidden_size
    return 6 * vision.hidden_size + inner // _split(recipe)


def _split(recipe: Recipe) -> int:
    """Return the number of ranks that share the inner width of the tower's layers."""
    parallel = recipe.parallel
    if parallel.vision_tensor_parallel:
        return parallel.tensor_model_parallel_size
    return 1
