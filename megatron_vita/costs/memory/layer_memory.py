"""Device memory that a layer of the language model keeps for its backward, and needs while it runs.

Counted for fused attention, with fused norms and SwiGLU, as Transformer Engine's layers have them.
Everything is per rank and pack. Letters: t tokens of the slice, H hidden size, F MLP width, d width
of a head, b bytes of a value; sizes `hidden`, `gathered`, `query`, `keys` and `mlp` are those of
`LayerTensors`.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config import Recipe, adapted_maps, layer_memory
from megatron_vita.rounding import ceil_div

Kept = Literal["everything", "all_but_mlp", "input_and_attention", "input"]
"""Tensors of a layer that stay between its forward and its backward."""


def value_bytes(recipe: Recipe) -> int:
    """Return the bytes of a weight or an activation."""
    if recipe.training.bf16:
        return 2
    return 4


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Recomputation and offloading of one layer."""

    kept: Kept
    pieces: int = 1  # of the sequence, which the MLP takes one after another where it is recomputed
    offload: bool = False  # what is kept waits on the host


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """Sizes of a layer's tensors in bytes."""

    # [t / TP, H] under sequence parallelism, [t, H] without: residual stream, outputs of norms
    hidden: int
    # [t, H]: what a linear layer gathers under sequence parallelism; 0 without
    gathered: int
    # [t, query heads / TP x d]: queries, or attention's output
    query: int
    # [t, 2 x key groups / TP x d]: keys and values
    keys: int
    # [t, query heads / TP] in fp32: attention's log-sum-exps
    log_sums: int
    # [t, F / TP]: gate, up, or their product
    mlp: int
    # [H, F / TP]: the gradient of fc2's weights, half of fc1's
    weight: int
    # keys and values of other context-parallel ranks that attention holds
    context: int
    # layers that are frozen keep no inputs of linear layers
    frozen: bool
    # what adapters keep beside the inputs of each map of attention, and of those of the MLP: masks
    # and results of dropout, outputs that DoRA scales
    beside_qkv: int = 0
    beside_projection: int = 0
    beside_mlp: int = 0

    @property
    def attention_kept(self) -> int:
        """Bytes kept by attention without recomputation: 3 hidden + 2 query + keys.

        Input of the norm, norm's output, rotated queries and keys, values, attention's output,
        input of the MLP.
        """
        norms = 2 if self.frozen else 3
        beside = self.beside_qkv + self.beside_projection
        return norms * self.hidden + 2 * self.query + self.keys + self.log_sums + beside

    @property
    def mlp_kept(self) -> int:
        """Bytes kept by the MLP without recomputation: hidden + 3 mlp.

        Norm's output, gate and up, their product. The MLP's input is counted with attention, since
        the residual stream is the same tensor.
        """
        if self.frozen:
            return 2 * self.mlp
        return self.hidden + 3 * self.mlp + self.beside_mlp

    def kept(self, what: Kept) -> int:
        """Return the bytes that stay until the layer's backward."""
        return {
            "everything": self.attention_kept + self.mlp_kept,
            "all_but_mlp": self.attention_kept,
            "input_and_attention": self.hidden + self.query + self.log_sums,
            "input": self.hidden,
        }[what]

    def sent(self, plan: LayerPlan) -> int:
        """Return the bytes offloaded to the host: all that is kept but attention's log-sum-exps."""
        if not plan.offload:
            return 0
        kept = self.kept(plan.kept)
        if plan.kept == "input_and_attention":
            return kept - self.log_sums
        return kept

    def working(self, plan: LayerPlan, *, before: LayerPlan | None = None) -> int:
        """Return the peak bytes of a layer's backward, beside what it keeps.

        Its offloaded tensors are back by then, and those of the layer `before` arrive beside the
        backward of attention.
        """
        coming = 0
        if before is not None:
            coming = self.sent(before)
        return self.sent(plan) + max(
            self.mlp_working(plan), self.attention_working(plan.kept) + coming
        )

    def mlp_working(self, plan: LayerPlan) -> int:
        """Return the peak of the MLP's backward: gradients of it, or of a piece, and recomputed
        tensors."""
        # Attention's half, recomputed beforehand; the output projection's result and the sum that
        # the MLP begins with stand beside it.
        before = {
            "everything": 0,
            "all_but_mlp": 0,
            "input_and_attention": 2 * self.hidden + self.beside_projection,
            "input": self.attention_kept - self.hidden + self.hidden,
        }[plan.kept]
        inside = 0
        if plan.kept != "everything":
            inside = self.mlp_kept + self.hidden
        # In fc2 the gradient of its result gathered, the product's gradient and the weights'; in
        # SwiGLU (the product is gone) the gradients of gate and up; in fc1 (gate and up are gone
        # too) its input and its input's gradient, both gathered, and the weights'.
        gradients = max(
            (self.gathered + self.mlp) // plan.pieces + self.weight,
            2 * self.mlp // plan.pieces,
            (2 * self.gathered - self.mlp) // plan.pieces + 3 * self.weight,
        )
        # Gradients of three matrices are summed over pieces in fp32.
        sums = 0
        if plan.pieces > 1:
            sums = 2 * 3 * self.weight
        return before + inside // plan.pieces + self.hidden + gradients + sums

    def attention_working(self, what: Kept) -> int:
        """Return the peak of attention's backward: gradients and recomputed tensors, the MLP's
        freed."""
        recomputed = {
            "everything": 0,
            "all_but_mlp": 0,
            "input_and_attention": self.hidden + self.query + self.keys + self.beside_qkv,
            "input": self.attention_kept - self.hidden,
        }[what]
        # Beside the gradient of the residual stream: in attention the gradients of output, queries,
        # keys and values, the queries' in fp32, and one more of a query's size, as measured peaks
        # say; in the projection the gradients of queries, keys and values, twice, and its input
        # and its input's gradient, both gathered.
        gradients = max(
            2 * self.query + self.keys + 3 * self.query + self.context,
            2 * (self.query + self.keys) + 2 * self.gathered,
        )
        return recomputed + self.hidden + gradients


def layer_tensors(recipe: Recipe) -> LayerTensors:
    """Compute tensor sizes of a layer on one rank."""
    language = recipe.model.language
    parallel = recipe.parallel
    size = value_bytes(recipe)
    tp = parallel.tensor_model_parallel_size
    tokens = recipe.data.seq_length // parallel.context_parallel_size
    whole = tokens * language.hidden_size * size
    heads = language.num_attention_heads // tp
    query = heads * language.kv_channels
    keys = 2 * language.query_groups_of_rank(tp) * language.kv_channels
    # With fewer key heads than ranks, megatron-core gathers the joint projection over TP: values
    # are a view of all ranks' queries, keys and values, which they keep alive.
    if language.num_query_groups < tp:
        keys = (language.num_attention_heads + 2 * language.num_query_groups) * language.kv_channels
    mlp = language.ffn_hidden_size // tp
    # Norms of heads keep their inputs, beside the rotated results that attention keeps.
    normed = 0
    if language.qk_layernorm:
        normed = query + keys // 2
    hidden = whole
    gathered = 0
    if parallel.sequence_parallel:
        hidden = whole // tp
        gathered = whole
    # Gradients of frozen weights are not made.
    weight = 0
    if not recipe.training.freeze_language_model:
        weight = mlp * language.hidden_size * size
    beside = _kept_by_adapters(
        recipe,
        inputs={
            "linear_qkv": hidden,
            "linear_proj": tokens * query * size,
            "linear_fc1": hidden,
            "linear_fc2": tokens * mlp * size,
        },
        outputs={
            "linear_qkv": tokens * (query + keys) * size,
            "linear_proj": hidden,
            "linear_fc1": 2 * tokens * mlp * size,
            "linear_fc2": hidden,
        },
    )
    return LayerTensors(
        hidden=hidden,
        gathered=gathered,
        query=tokens * query * size,
        keys=tokens * (keys + normed) * size,
        log_sums=tokens * heads * 4,
        mlp=tokens * mlp * size,
        weight=weight,
        context=_context_buffers(recipe, keys_of_slice=tokens * keys * size),
        # Adapters read the same inputs as the maps beside them.
        frozen=recipe.is_frozen("language_model"),
        beside_qkv=beside["linear_qkv"],
        beside_projection=beside["linear_proj"],
        beside_mlp=beside["linear_fc1"] + beside["linear_fc2"],
    )


def _kept_by_adapters(
    recipe: Recipe, *, inputs: dict[str, int], outputs: dict[str, int]
) -> dict[str, int]:
    """Return the bytes that adapters keep beside each kind of map: dropout's mask and result of the
    input, and the output that DoRA scales.

    Layers with different adapters are counted as if each had those of all.
    """
    kept = dict.fromkeys(inputs, 0)
    if not (recipe.lora.dropout or recipe.lora.dora):
        return kept
    kinds = {adapted.linear.kind for adapted in adapted_maps(recipe.model, recipe.lora)}
    for kind in kinds & kept.keys():
        if recipe.lora.dropout:
            kept[kind] += 2 * inputs[kind]
        if recipe.lora.dora:
            kept[kind] += outputs[kind]
    return kept


def plan_layers(recipe: Recipe, count: int) -> list[LayerPlan]:
    """Return the plans of the layers that a rank runs one after another.

    The recipe's recomputation must not be `uniform`, whose groups no plan describes.
    """
    training = recipe.training
    parallel = recipe.parallel
    selective = training.recompute_granularity == "selective"
    # `core_attn` among the modules saves nothing: fused attention keeps no scores.
    otherwise: Kept = "everything"
    if selective and "mlp" in training.recompute_modules:
        otherwise = "all_but_mlp"
    rows = recipe.data.seq_length // parallel.context_parallel_size
    if parallel.sequence_parallel:
        rows //= parallel.tensor_model_parallel_size
    plans = []
    for memory in layer_memory(recipe, count):
        kept: Kept = otherwise
        if memory.keep_attention:
            kept = "input_and_attention"
        elif memory.recompute:
            kept = "input"
        pieces = 1
        if memory.mlp_rows and kept != "everything":
            pieces = ceil_div(rows, memory.mlp_rows)
        plans.append(LayerPlan(kept=kept, pieces=pieces, offload=memory.offload))
    return plans


def _context_buffers(recipe: Recipe, *, keys_of_slice: int) -> int:
    """Return the bytes of other CP ranks' keys and values, and of their gradients.

    A ring holds those in use and those arriving; the other schemes hold all.
    """
    cp = recipe.parallel.context_parallel_size
    if cp == 1:
        return 0
    # fa4 gathers keys and values whatever the type of communication.
    ring = recipe.parallel.cp_comm_type == "p2p" and recipe.parallel.attention_backend != "fa4"
    if ring:
        return keys_of_slice * 4
    return keys_of_slice * 2 * cp
