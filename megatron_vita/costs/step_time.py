"""Time of a training step, from amounts of work by kind and a device's rates.

Kinds follow one another: a rank's time is their sum; with a pipeline that of the slowest stage,
with the bubble. Measured steps to compare with: `tests/costs/test_step_time.py`.
"""

import functools
import math
from dataclasses import dataclass, fields

import numpy as np

from megatron_vita.config import Recipe
from megatron_vita.costs.devices import Device
from megatron_vita.costs.flops import (
    projector_flops,
    reference_passes,
    tower_attention_flops,
    tower_flops,
)
from megatron_vita.costs.memory.layer_memory import (
    LayerPlan,
    layer_tensors,
    plan_layers,
    value_bytes,
)
from megatron_vita.costs.memory.memory import PackLoad
from megatron_vita.costs.memory.optimizer_memory import optimizer_bytes, optimizer_shards
from megatron_vita.costs.memory.parameters import language_layer, stage_parameters
from megatron_vita.costs.memory.vision_memory import tiles_of_rank
from megatron_vita.rounding import ceil_div

RANKS_PER_NODE = 8
BACKWARD_ATTENTION = 2.5
"""Products of attention's backward over those of its forward: 5 over 2."""
WITHOUT_OUTPUT = 2 / 3
"""Fraction of an MLP's forward pass that is left without its last product: 2 of 3 matrices."""
PACKED_BYTES = 0.56
"""Bytes of a 4-bit weight with its part of a scale."""
HOST_RATE = 50e9
"""Bytes/s that a rank's part of the host's cores reads and writes in Adam; not measured."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by kind of work, on the slowest pipeline stage."""

    linear: float
    attention: float
    vision: float
    output: float
    elementwise: float
    communication: float  # between TP and CP ranks and stages, as far as it is waited for
    host_copies: float  # as far as they are waited for
    bubble: float  # of the pipeline
    optimizer: float  # with reduction of gradients and gathering of weights

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, part.name) for part in fields(self))


def step_time(
    recipe: Recipe,
    device: Device,
    *,
    data_parallel: int,
    load: PackLoad,
    ranks_per_node: int = RANKS_PER_NODE,
) -> StepTime:
    """Estimate the step time for packs like `load`."""
    # Measured: without the pauses of TP's collectives, matrix products are slower (see `devices`).
    matmul = device.matmul
    if recipe.parallel.tensor_model_parallel_size == 1:
        matmul = device.matmul_alone
    machine = _Machine(device=device, ranks_per_node=ranks_per_node, matmul=matmul)
    stages = recipe.parallel.pipeline_model_parallel_size
    # One stage is the slowest; the others wait for it, pack after pack.
    times = [_Stage(recipe, stage, load, machine).time() for stage in range(stages)]
    slowest = max(times, key=lambda parts: sum(parts.values()))
    packs = recipe.training.global_batch_size // data_parallel
    # Each stage waits for the others once at the beginning and once at the end; interleaved chunks
    # shorten both.
    waiting = (stages - 1) / recipe.parallel.virtual_pipeline_model_parallel_size
    steps = {name: packs * seconds for name, seconds in slowest.items()}
    return StepTime(
        **steps,
        bubble=waiting * sum(slowest.values()),
        optimizer=max(
            _optimizer(recipe, stage, machine, data_parallel=data_parallel)
            for stage in range(stages)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Machine:
    device: Device
    ranks_per_node: int
    matmul: float

    def collective(self, received: float, *, spanned: int) -> float:
        """Return the seconds of a collective in which a rank receives `received` bytes.

        `spanned` consecutive ranks contain the group.
        """
        if spanned <= self.ranks_per_node:
            return received / self.device.link
        return received / self.device.network


class _Stage:
    """Work of one rank of a pipeline stage for one pack."""

    def __init__(self, recipe: Recipe, stage: int, load: PackLoad, machine: _Machine) -> None:
        self.recipe = recipe
        self.stage = stage
        self.load = load
        self.machine = machine
        parallel = recipe.parallel
        self.tp = parallel.tensor_model_parallel_size
        self.cp = parallel.context_parallel_size
        self.tensors = layer_tensors(recipe)
        self.layer = language_layer(recipe.model.language)
        count = parallel.layers_of_stages(recipe.model.language.num_layers)[stage]
        chunks = parallel.virtual_pipeline_model_parallel_size
        self.plans = plan_layers(recipe, count // chunks) * chunks
        self.trained = not recipe.training.freeze_language_model
        self.reference = reference_passes(recipe)

    def time(self) -> dict[str, float]:
        """Return seconds by kind."""
        return {
            "linear": sum(map(self._linear, self.plans)),
            "attention": sum(map(self._attention, self.plans)),
            "vision": self._vision(),
            "output": self._output(),
            "elementwise": sum(map(self._elementwise, self.plans)),
            "communication": sum(map(self._communication, self.plans)) + self._between_stages(),
            "host_copies": sum(map(self._host_copies, self.plans)),
        }

    def _repeats(self, plan: LayerPlan) -> tuple[float, float, float]:
        """Return the extra forward passes of attention's projections, of attention, and of the MLP.

        Our own layers skip the last product of a recomputed MLP.
        """
        training = self.recipe.training
        if training.recompute_granularity == "full" and training.recompute_method == "uniform":
            return 1, 1, 1
        if plan.kept == "input":
            return 1, 1, WITHOUT_OUTPUT
        if plan.kept == "input_and_attention":
            return 1, 0, WITHOUT_OUTPUT
        selective = training.recompute_granularity == "selective"
        attention = 0
        if selective and "core_attn" in training.recompute_modules:
            attention = 1
        if plan.kept == "everything":
            return 0, attention, 0
        # In pieces, the MLP is recomputed by our layer; whole, by megatron-core.
        if plan.pieces > 1:
            return 0, attention, WITHOUT_OUTPUT
        return 0, attention, 1

    def _extra_passes(self, plan: LayerPlan) -> tuple[float, float, float]:
        """Return `_repeats` and the pass through the reference of pairs."""
        around, attention, inside = self._repeats(plan)
        return around + self.reference, attention + self.reference, inside + self.reference

    def _linear(self, plan: LayerPlan) -> float:
        """Return the seconds of linear maps: 2 FLOPs for each token and weight.

        Forward, again where recomputed, and backward once for inputs and once for weights.
        """
        language = self.recipe.model.language
        tokens = self.recipe.data.seq_length // self.cp
        mlp = 3 * language.ffn_hidden_size * language.hidden_size
        projections = self.layer.split - mlp
        around, _, inside = self._extra_passes(plan)
        backward = 1
        if self.trained:
            backward = 2
        passes = projections * (1 + around + backward) + mlp * (1 + inside + backward)
        gain = self.machine.device.fp8_gain[self.recipe.training.fp8_recipe]
        return 2 * tokens * passes / self.tp / (self.machine.matmul * gain)

    def _attention(self, plan: LayerPlan) -> float:
        """Return the seconds of attention: forward, again where recomputed, and backward."""
        _, again, _ = self._extra_passes(plan)
        forward, backward = self._attention_passes
        return (1 + again) * forward + backward

    @functools.cached_property
    def _attention_passes(self) -> tuple[float, float]:
        """Seconds of a layer's attention, forward and backward.

        2 x heads x d FLOPs for each square of a document's length (causal), at the rate of that
        length, which a ring cuts by CP.
        """
        language = self.recipe.model.language
        parallel = self.recipe.parallel
        # `auto` is not decided here, and `torch` has no rates: cuDNN's are the cautious guess.
        backend = "te"
        if parallel.attention_backend == "fa4":
            backend = "fa4"
        # A ring attends to one rank's keys at a time, in kernels as small as its slices.
        pieces = 1
        if parallel.cp_comm_type == "p2p" and backend == "te":
            pieces = self.cp
        lengths = list(self.load.lengths) or [self.recipe.data.seq_length]
        if not self.recipe.data.isolate_documents:
            # They attend to the padding, too.
            lengths = [self.recipe.data.seq_length]
        once = 0.0
        back = 0.0
        for length, number in zip(*np.unique(lengths, return_counts=True), strict=True):
            forward, backward = self.machine.device.attention_rates(backend, int(length) // pieces)
            work = 2.0 * int(length) ** 2 * language.num_attention_heads * language.kv_channels
            work *= int(number) / self.tp / self.cp
            once += work / forward
            back += BACKWARD_ATTENTION * work / backward
        return once, back

    def _host_copies(self, plan: LayerPlan) -> float:
        """Return the seconds that a step waits for copies between device and host.

        They run beside the layer's forward pass, and beside the backward of attention of the layer
        above; only the rest is waited for.
        """
        seconds = self.tensors.sent(plan) / self.machine.device.host_copy
        if not seconds:
            return 0.0
        forward, backward = self._attention_passes
        tokens = self.recipe.data.seq_length // self.cp
        rate = self.machine.matmul
        linear = 2 * tokens * self.layer.split / self.tp / rate
        return max(0.0, seconds - forward - linear) + max(0.0, seconds - backward)

    def _elementwise(self, plan: LayerPlan) -> float:
        """Return the seconds of norms, rotations, residuals, SwiGLU and copies, by bytes moved.

        Forward: 10 hidden (two norms, two residuals), 4 query + 3 keys (rotation, copies), 3 mlp
        (SwiGLU). Backward: 12 hidden, 12 query + 3 keys (with fp32 sums of the queries' gradients),
        5 mlp. Weight gradients are added to their sums in the matrix products.
        """
        t = self.tensors
        around, _, inside = self._extra_passes(plan)
        attention = 5 * t.hidden + 4 * t.query + 3 * t.keys
        mlp = 5 * t.hidden + 3 * t.mlp
        forward = attention * (1 + around) + mlp * (1 + math.ceil(inside))
        backward = 12 * t.hidden + 12 * t.query + 3 * t.keys + 5 * t.mlp
        unpacked = self._unpacked_bytes(plan)
        return (forward + backward + unpacked) / self.machine.device.bandwidth

    def _unpacked_bytes(self, plan: LayerPlan) -> float:
        """Return the bytes that are read and written to compute 4-bit weights for each product.

        Forward, again where recomputed, and backward; of an MLP in pieces for each piece.
        """
        if not self.recipe.lora.quantizes:
            return 0.0
        language = self.recipe.model.language
        around, _, inside = self._extra_passes(plan)
        mlp = 3 * language.ffn_hidden_size * language.hidden_size
        products = (self.layer.split - mlp) * (2 + around) + mlp * (2 + inside) * plan.pieces
        return products / self.tp * (value_bytes(self.recipe) + PACKED_BYTES)

    def _communication(self, plan: LayerPlan) -> float:
        """Return the seconds of collectives over TP and CP that are waited for.

        TP gathers and scatters hidden states 4 times forward, as often again as is recomputed (an
        MLP without its last product only gathers), and 6 times backward; CP gathers keys and
        values, and reduces their gradients. A ring sends keys beside attention.
        """
        t = self.tensors
        machine = self.machine
        around, attention, inside = self._repeats(plan)
        whole = t.gathered or t.hidden
        received = whole * (self.tp - 1) / self.tp
        again = 2 * inside
        if inside == WITHOUT_OUTPUT:
            again = 1
        times = 4 * (1 + self.reference) + 2 * around + again + 6
        seconds = times * machine.collective(received, spanned=self.tp)
        parallel = self.recipe.parallel
        ring = parallel.cp_comm_type == "p2p" and parallel.attention_backend != "fa4"
        if self.cp == 1 or ring:
            return seconds
        keys = t.keys * (self.cp - 1)
        # forward, again for backward, and gradients in fp32
        times = 2 + attention + 2 + self.reference
        return seconds + times * machine.collective(keys, spanned=self.tp * self.cp)

    def _between_stages(self) -> float:
        """Return the seconds to receive a hidden state, and its gradient, from the adjacent
        stages."""
        stages = self.recipe.parallel.pipeline_model_parallel_size
        if stages == 1:
            return 0.0
        # Stages are the outermost dimension of ranks: their messages are taken to cross nodes.
        spanned = self.machine.ranks_per_node + 1
        messages = 2 + self.reference
        return messages * self.machine.collective(self.tensors.hidden, spanned=spanned)

    def _vision(self) -> float:
        """Return the seconds of tower and projector on the rank with the most tiles.

        Matrix products, attention, and 36 passes over a layer's residual stream (66 ms forward and
        211 ms backward were measured for 38 tiles).
        """
        recipe = self.recipe
        device = self.machine.device
        if self.stage > 0 or recipe.model.text_only:
            return 0.0
        vision = recipe.model.vision
        training = recipe.training
        tiles = tiles_of_rank(recipe, self.load.tiles)
        split = 1
        if recipe.parallel.vision_tensor_parallel:
            split = self.tp
        attention = vision.num_layers * tower_attention_flops(vision) / split
        products = (tower_flops(vision) / split - attention) + projector_flops(recipe.model)
        stream = vision.num_layers * vision.tokens * vision.hidden_size * value_bytes(recipe)
        # A frozen tower runs forward once; a trained one also backward, and forward again where it
        # is recomputed.
        passes = 1.0 + self.reference
        attention_passes = 1.0 + self.reference
        if not recipe.is_frozen("vision_model"):
            again = int(training.recompute_vision)
            passes += again + 2
            attention_passes += again + BACKWARD_ATTENTION
        seconds = products * passes / self.machine.matmul
        seconds += attention * attention_passes / device.tile_attention
        seconds += 36 * stream * passes / device.bandwidth
        return tiles * seconds

    def _output(self) -> float:
        """Return the seconds of the output layer, at 0.8 of the rate of layers.

        Products of the loss tokens' rows with the vocabulary shard: forward, and backward once for
        rows and once for weights that are trained. Pairs need it forward twice more: for the
        reference, and for the sums over a pair that their gradients depend on.
        """
        recipe = self.recipe
        if self.stage < recipe.parallel.pipeline_model_parallel_size - 1:
            return 0.0
        language = recipe.model.language
        rows = ceil_div(self.load.loss_tokens, self.cp)
        products = 2 + int(self.trained) + 2 * self.reference
        flops = 2 * products * rows * language.vocab_size // self.tp * language.hidden_size
        return flops / (0.8 * self.machine.matmul)


def _optimizer(recipe: Recipe, stage: int, machine: _Machine, *, data_parallel: int) -> float:
    """Return the seconds of the optimizer, gradient reduction and weight gathering.

    Adam reads its state and the gradient and writes its state and the weight, for the rank's shard;
    all gradients are zeroed, measured and scaled (4 passes); they are reduced and weights gathered
    over DP x CP. What is updated on the host is copied there and back, and read and written at the
    host's rate.
    """
    parallel = recipe.parallel
    kinds = optimizer_bytes(recipe)
    trained = stage_parameters(recipe, stage).trainable(recipe)
    shards = optimizer_shards(recipe, data_parallel)
    weight = value_bytes(recipe)
    device = machine.device
    adam = 2 * kinds.state + kinds.gradient + weight
    seconds = trained * (adam / shards + 4 * kinds.gradient) / device.bandwidth
    if kinds.host:
        offloaded = trained * recipe.optimizer.optimizer_offload_fraction / shards
        seconds += offloaded * (2 * kinds.host / HOST_RATE + (4 + weight) / device.host_copy)
    ranks = data_parallel * parallel.context_parallel_size
    if ranks == 1:
        return seconds
    spanned = ranks * parallel.tensor_model_parallel_size
    moved = (ranks - 1) / ranks * trained
    # Overlapped communication runs beside backward and forward passes, and is not waited for.
    reduced = 0.0
    gathered = 0.0
    if not parallel.overlap_grad_reduce:
        reduced = kinds.gradient * moved
    if not parallel.overlap_param_gather:
        gathered = weight * moved
    if not parallel.use_distributed_optimizer:
        # An all-reduce: gradients are gathered as they are scattered.
        gathered = reduced
    return seconds + machine.collective(reduced + gathered, spanned=spanned)
