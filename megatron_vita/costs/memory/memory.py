"""Device memory of one rank, in bytes, from a recipe.

`RankMemory.peak` predicts torch's `max_memory_allocated` from the second step on (the first
allocates Adam's moments at its end). `RankMemory.device` adds what torch reserves beyond that, and
what libraries allocate outside of it. Measured peaks to compare with: `tests/costs/test_memory.py`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_vita.config import Recipe
from megatron_vita.costs.memory.layer_memory import (
    LayerPlan,
    LayerTensors,
    layer_tensors,
    plan_layers,
    value_bytes,
)
from megatron_vita.costs.memory.optimizer_memory import optimizer_bytes, optimizer_shards
from megatron_vita.costs.memory.parameters import StageParameters, stage_parameters
from megatron_vita.costs.memory.quantized import dense_bytes, weight_bytes
from megatron_vita.costs.memory.schedule import most_kept
from megatron_vita.costs.memory.vision_memory import vision_kept, vision_working
from megatron_vita.rounding import ceil_div

GIB = 1 << 30
LIBRARIES = 3 * GIB
"""CUDA's context and kernels, NCCL's buffers, libraries' workspaces: 2 to 4 GiB were measured."""
FRAGMENTATION = 0.035
"""Fraction of the peak that torch's allocator reserves and cannot use: 0.8 to 3.8 % in the steps
of benchmarks/results/2026-11-28-training.md."""


@dataclass(frozen=True, kw_only=True)
class PackLoad:
    """Content of a pack, as far as costs depend on it."""

    tiles: int
    loss_tokens: int
    # Tokens of its documents; empty: one document as long as the pack.
    lengths: tuple[int, ...] = field(default=())


def full_pack(recipe: Recipe) -> PackLoad:
    """Return the most expensive pack of a recipe: one document, full of tiles, an eighth loss
    tokens.

    Of text alone: all tokens are loss tokens. Of pairs: the conversations of one pair.
    """
    length = recipe.data.seq_length
    lengths: tuple[int, ...] = (length,)
    if recipe.dpo.beta:
        lengths = (ceil_div(length, 2), length // 2)
    if recipe.model.text_only:
        return PackLoad(tiles=0, loss_tokens=length, lengths=lengths)
    tiles = length // (recipe.model.vision.image_token_length + 2)
    return PackLoad(tiles=tiles, loss_tokens=length // 8, lengths=lengths)


def describe_full_pack(recipe: Recipe) -> str:
    """Describe the content of `full_pack`."""
    content = "one pair" if recipe.dpo.beta else "one document"
    if recipe.model.text_only:
        return f"{content} of loss tokens alone"
    return f"{content} full of tiles, with every eighth token a loss token"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point of a step at which memory may peak; bytes beside weights, gradients and optimizer."""

    name: str
    activations: int  # kept by layers of the language model, of all packs in flight
    vision: int  # kept by tower and projector
    temporary: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.activations + self.vision + self.temporary


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Device memory in bytes by part, at the moment of a step that needs most."""

    weights: int
    gradients: int
    optimizer: int
    highest: Moment

    @property
    def peak(self) -> int:
        """Bytes allocated by torch at the peak."""
        return self.weights + self.gradients + self.optimizer + self.highest.total

    @property
    def device(self) -> int:
        """Bytes of the device in use at the peak, as nvidia-smi counts them."""
        return int(self.peak * (1 + FRAGMENTATION)) + LIBRARIES

    def parts(self) -> dict[str, int]:
        """Return the parts of `peak` by name, in bytes."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.highest.activations,
            "vision": self.highest.vision,
            "temporary": self.highest.temporary,
        }


def rank_memory(recipe: Recipe, stage: int, *, data_parallel: int, load: PackLoad) -> RankMemory:
    """Estimate device memory for a rank of pipeline stage `stage`, for packs like `load`."""
    parameters = stage_parameters(recipe, stage)
    kinds = optimizer_bytes(recipe)
    trained = parameters.trainable(recipe)
    shards = optimizer_shards(recipe, data_parallel)
    moments = [
        *_moments(recipe, stage, data_parallel=data_parallel, load=load),
        Moment(
            name="optimizer",
            activations=0,
            vision=0,
            temporary=int(trained * kinds.temporary) // shards,
        ),
    ]
    return RankMemory(
        weights=weight_bytes(recipe, stage),
        gradients=trained * kinds.gradient,
        optimizer=int(trained * kinds.state) // shards,
        highest=max(moments, key=lambda moment: moment.total),
    )


def _moments(recipe: Recipe, stage: int, *, data_parallel: int, load: PackLoad) -> Iterator[Moment]:
    """Yield the points of a step at which memory may peak."""
    parallel = recipe.parallel
    tensors = layer_tensors(recipe)
    parameters = stage_parameters(recipe, stage)
    chunk, working = _chunk_of_layers(recipe, stage, tensors)
    encodes = stage == 0 and not recipe.model.text_only
    tower = 0
    if encodes:
        tower = vision_kept(recipe, load.tiles)

    def held(first_chunk_extra: int) -> int:
        count = parallel.virtual_pipeline_model_parallel_size
        # A stage also keeps its output until backward, unless the output layer consumes it at once.
        chunks = [chunk + tensors.hidden] * count
        chunks[0] += first_chunk_extra
        return most_kept(recipe, stage, data_parallel=data_parallel, chunks=chunks)

    activations = held(0)
    vision = held(tower) - activations
    yield Moment(
        name="layer",
        activations=activations - tensors.hidden,
        vision=vision,
        temporary=working + dense_bytes(recipe),
    )
    if stage == parallel.pipeline_model_parallel_size - 1:
        temporary = _output_working(recipe, load.loss_tokens, tensors, parameters)
        yield Moment(name="output", activations=activations, vision=vision, temporary=temporary)
    # While a pack is encoded, or goes backward through the tower, its layers keep nothing.
    others = max(activations - (chunk + tensors.hidden), 0)
    if encodes:
        temporary = vision_working(recipe, load.tiles) + 2 * tensors.hidden
        yield Moment(name="vision", activations=others, vision=vision, temporary=temporary)
    if stage == 0:
        # The word embedding's gradient in the weights' precision, before it is added to fp32 sums.
        embedding = 0
        if not recipe.training.freeze_language_model:
            embedding = parameters.embedding
        temporary = embedding * value_bytes(recipe) + tensors.hidden + tensors.gathered
        yield Moment(name="embedding", activations=others, vision=vision, temporary=temporary)


def _chunk_of_layers(recipe: Recipe, stage: int, tensors: LayerTensors) -> tuple[int, int]:
    """Return the bytes that a pack keeps in a chunk of layers, and the peak of its backward
    beside."""
    training = recipe.training
    parallel = recipe.parallel
    layers = parallel.layers_of_stages(recipe.model.language.num_layers)[stage]
    count = layers // parallel.virtual_pipeline_model_parallel_size
    if training.recompute_granularity == "full" and training.recompute_method == "uniform":
        group = training.recompute_num_layers or 1
        # The whole group is recomputed before its last layer goes backward.
        others = (group - 1) * tensors.kept("everything")
        return ceil_div(count, group) * tensors.hidden, others + tensors.working(
            LayerPlan(kept="input")
        )
    # In the order of the backward pass: what later layers kept is freed before earlier ones run.
    working = 0
    kept = 0
    plans = plan_layers(recipe, count)
    of_layer = functools.cache(tensors.working)  # most layers are alike
    for i, plan in reversed(list(enumerate(plans))):
        before = None
        if i > 0:
            before = plans[i - 1]
        working = max(working, of_layer(plan, before=before) - kept)
        kept += tensors.kept(plan.kept) - tensors.sent(plan)
    return kept, working


def _output_working(
    recipe: Recipe, rows: int, tensors: LayerTensors, parameters: StageParameters
) -> int:
    """Return the peak bytes of the output layer.

    Final norm's output and the gradient of the hidden state, the selected rows (overwritten by
    their gradients), and one chunk of logits, whose softmax is in place.
    """
    language = recipe.model.language
    size = value_bytes(recipe)
    tp = recipe.parallel.tensor_model_parallel_size
    cp = recipe.parallel.context_parallel_size
    columns = ceil_div(language.vocab_size, tp)
    if recipe.model.output.full_logits:
        tokens = recipe.data.seq_length // cp
        # Logits, and in fp32 the same, a masked copy, and the softmax that backward needs.
        return 2 * tensors.hidden + tensors.gathered + tokens * columns * (size + 3 * 4)
    mine = ceil_div(rows, cp)
    logits = min(recipe.model.output.chunk_mib << 20, mine * columns * size)
    return 2 * tensors.hidden + mine * language.hidden_size * size + logits
