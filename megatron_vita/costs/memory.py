"""Memory of one rank in bytes, from a recipe. What libraries hold (about 2 to 4 GiB on a GPU) is
not counted.

Activations are those of fused attention and of megatron-core's layers; `benchmarks/results/`
compares them with peaks.
"""

from dataclasses import dataclass, fields

from megatron_vita.config import Recipe, VisionConfig
from megatron_vita.costs.parameters import stage_parameters

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of the language model's layers
    vision: int
    output: int

    @property
    def total(self) -> int:
        """Of all."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class PackLoad:
    """What a pack brings."""

    tiles: int
    rows: int  # that are scored


def rank_memory(recipe: Recipe, stage: int, *, data_parallel: int, load: PackLoad) -> RankMemory:
    """On a rank of pipeline stage `stage`, for packs such as `load`."""
    parallel, bf16 = recipe.parallel, recipe.training.bf16
    parameters = stage_parameters(recipe, stage)
    trained = parameters.trainable(recipe)
    shards = (
        data_parallel * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    )
    last = stage == parallel.pipeline_model_parallel_size - 1
    return RankMemory(
        weights=parameters.total * _value(recipe),
        gradients=trained * 4,  # summed in fp32
        # two moments, and fp32 weights beside bf16 ones
        optimizer=trained * (12 if bf16 else 8) // shards,
        activations=_language_activations(recipe, stage, data_parallel=data_parallel),
        vision=_vision_activations(recipe, load.tiles)
        if stage == 0 and not recipe.model.text_only
        else 0,
        output=_output_activations(recipe, load.rows) if last else 0,
    )


def saving_memory(recipe: Recipe, stage: int, *, data_parallel: int) -> int:
    """Bytes of its host's memory that a rank of pipeline stage `stage` takes while a checkpoint is
    written.

    Each rank gathers all of a distributed optimizer's state, weights in fp32 and two moments,
    there; then it writes a copy of its share of that and of the weights. Blocks that torch pins and
    rounds up on GPUs are not counted.
    """
    parallel = recipe.parallel
    parameters = stage_parameters(recipe, stage)
    sharded = parallel.use_distributed_optimizer
    state = parameters.trainable(recipe) * (12 if sharded or recipe.training.bf16 else 8)
    share = (state + parameters.total * _value(recipe)) // (
        data_parallel * parallel.context_parallel_size
    )
    return (state if sharded else 0) + share


def _value(recipe: Recipe) -> int:
    return 2 if recipe.training.bf16 else 4


def _layer_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes that a language model layer keeps for its backward of one pack: of its input alone, and
    of all."""
    language, parallel = recipe.model.language, recipe.parallel
    tokens = recipe.data.seq_length // parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size
    width = language.hidden_size // (tp if parallel.sequence_parallel else 1)
    query = language.num_attention_heads * language.kv_channels
    keys = 2 * language.num_query_groups * language.kv_channels
    # Input, norm, residual, norm; projections, their rotated copies, attention; gate, up and their
    # product.
    inner = (query + keys) + (query + keys // 2) + query + 3 * language.ffn_hidden_size
    return tokens * width * _value(recipe), tokens * (4 * width + inner // tp) * _value(recipe)


def _language_activations(recipe: Recipe, stage: int, *, data_parallel: int) -> int:
    training, parallel = recipe.training, recipe.parallel
    layers = parallel.layers_of_stages(recipe.model.language.num_layers)[stage]
    chunk = layers // parallel.virtual_pipeline_model_parallel_size
    layer_input, everything = _layer_bytes(recipe)
    kept, working = chunk * everything, everything
    if training.recompute_granularity == "full":
        recomputed = min(training.recompute_num_layers or chunk, chunk)
        if training.recompute_method == "uniform":
            group = training.recompute_num_layers or 1
            kept, working = -(-chunk // group) * layer_input, (group + 1) * everything
        else:
            kept, working = (
                recomputed * layer_input + (chunk - recomputed) * everything,
                2 * everything,
            )
    if training.freeze_language_model and (stage > 0 or recipe.model.text_only):
        working = everything  # gradients still pass through to the projector
    return (
        kept * _packs_in_flight(recipe, stage, data_parallel=data_parallel)
        + working
        + _context_buffers(recipe)
    )


def _packs_in_flight(recipe: Recipe, stage: int, *, data_parallel: int) -> int:
    """Chunks of layers whose forward has run and whose backward has not, at most, in
    megatron-core's schedules."""
    parallel = recipe.parallel
    stages, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    packs = recipe.training.global_batch_size // data_parallel
    if chunks == 1:
        return min(stages - stage, packs)
    return min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, packs * chunks)


def _context_buffers(recipe: Recipe) -> int:
    """Keys and values of other context-parallel ranks that a layer's attention holds."""
    language, parallel = recipe.model.language, recipe.parallel
    cp = parallel.context_parallel_size
    if cp == 1:
        return 0
    keys = (
        2 * language.num_query_groups * language.kv_channels // parallel.tensor_model_parallel_size
    )
    slice_bytes = recipe.data.seq_length // cp * keys * _value(recipe)
    return slice_bytes * (4 if parallel.cp_comm_type == "p2p" else 2 * cp)


def _vision_activations(recipe: Recipe, tiles: int) -> int:
    """Of tower and projector, and of the tiles and their features, on the rank with the most
    tiles."""
    vision, training = recipe.model.vision, recipe.training
    mine = -(-tiles // recipe.parallel.tile_ranks)
    at_once = min(mine, training.vision_tiles_at_once)
    layer, tokens = _tower_layer(vision), vision.tokens
    tower = at_once * tokens * layer
    if not training.freeze_vision_model:
        kept = vision.hidden_size if training.recompute_vision else layer
        tower += mine * tokens * kept * vision.num_layers
    wide = recipe.model.language.hidden_size
    hidden = wide if recipe.model.projector.kind == "internvl" else vision.hidden_size
    projected = vision.image_token_length * (8 * vision.hidden_size + 2 * hidden + 3 * wide)
    pixels = 3 * vision.image_size**2
    return (tower + mine * (projected + pixels)) * _value(recipe) + mine * pixels


def _tower_layer(vision: VisionConfig) -> int:
    """Values that a layer keeps for each patch."""
    return 10 * vision.hidden_size + 2 * vision.ffn_hidden_size


def _output_activations(recipe: Recipe, rows: int) -> int:
    """A chunk of logits, and the selected rows, whose gradients take their place."""
    mine = -(-rows // recipe.parallel.context_parallel_size)
    return (
        recipe.model.output.chunk_mib << 20
    ) + mine * recipe.model.language.hidden_size * _value(recipe)
