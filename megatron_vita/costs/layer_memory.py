"""Bytes that one layer of the language model keeps for its backward, and takes while it runs.

Counted for fused attention, with a fused norm and SwiGLU, as Transformer Engine's layers have them.
Everything is per rank and pack. Letters: t tokens of the slice, H hidden size, F MLP width, d width
of a head, b bytes of a value.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config import Recipe

Kept = Literal["everything", "all_but_mlp", "input"]
"""Tensors of a layer that stay between its forward and its backward."""


def value_bytes(recipe: Recipe) -> int:
    """Bytes of a weight or an activation."""
    return 2 if recipe.training.bf16 else 4


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
    # [t, F / TP]: gate, up, or their product
    mlp: int
    # the weights' gradients of fc2 before they are added to the fp32 ones: [H, F / TP]
    weight_gradient: int
    # keys and values of other context-parallel ranks that attention holds
    context: int
    # layers that are frozen keep no inputs of linear layers
    frozen: bool

    @property
    def attention_kept(self) -> int:
        """Input of the norm, norm's output, rotated queries and keys, values, attention's output,
        input of the MLP: 3 hidden + 2 query + keys."""
        return (2 if self.frozen else 3) * self.hidden + 2 * self.query + self.keys

    @property
    def mlp_kept(self) -> int:
        """Norm's output, gate and up, their product: hidden + 3 mlp. The MLP's input is counted
        with attention, since the residual stream is the same tensor."""
        return 2 * self.mlp if self.frozen else self.hidden + 3 * self.mlp

    def kept(self, what: Kept) -> int:
        """Bytes that stay until the layer's backward."""
        if what == "input":
            return self.hidden
        return self.attention_kept + (self.mlp_kept if what == "everything" else 0)

    def working(self, what: Kept) -> int:
        """Most bytes beside what is kept, while the layer is recomputed and goes backward.

        Gradients of the MLP meet all its recomputed tensors; those of attention come when these
        are gone.
        """
        return max(self._mlp_working(what), self._attention_working(what))

    def _mlp_working(self, what: Kept) -> int:
        # The recomputed output lives until the backward of what was recomputed ends.
        recomputed = {
            "everything": 0,
            "all_but_mlp": self.mlp_kept + self.hidden,
            "input": self.attention_kept - self.hidden + self.mlp_kept + self.hidden,
        }[what]
        # Beside the gradient of the layer's output: in fc2 that gradient gathered, the product's
        # gradient and the weights'; in SwiGLU (the product is gone) the gradients of gate and up;
        # in fc1 (gate and up are gone too) its input and its input's gradient, both gathered.
        gradients = max(
            self.gathered + self.mlp + self.weight_gradient,
            2 * self.mlp,
            2 * self.gathered - self.mlp + 2 * self.weight_gradient,
        )
        return recomputed + self.hidden + gradients

    def _attention_working(self, what: Kept) -> int:
        recomputed = self.attention_kept if what == "input" else 0
        # Beside the gradient of the residual stream: in attention the gradients of output, queries,
        # keys and values, and the queries' in fp32; in the projection the gradients of queries,
        # keys and values, twice, and its input and its input's gradient, both gathered.
        gradients = max(
            2 * self.query + self.keys + 2 * self.query + self.context,
            2 * (self.query + self.keys) + 2 * self.gathered,
        )
        return recomputed + self.hidden + gradients


def layer_tensors(recipe: Recipe) -> LayerTensors:
    """Sizes for a layer of this recipe on one rank."""
    language, parallel, size = recipe.model.language, recipe.parallel, value_bytes(recipe)
    tp = parallel.tensor_model_parallel_size
    tokens = recipe.data.seq_length // parallel.context_parallel_size
    whole = tokens * language.hidden_size * size
    query = language.num_attention_heads * language.kv_channels // tp
    keys = 2 * language.num_query_groups * language.kv_channels // tp
    mlp = language.ffn_hidden_size // tp
    normed = query + keys // 2 if language.qk_layernorm else 0  # inputs of the heads' norms
    frozen = recipe.training.freeze_language_model
    return LayerTensors(
        hidden=whole // tp if parallel.sequence_parallel else whole,
        gathered=whole if parallel.sequence_parallel else 0,
        query=tokens * query * size,
        keys=tokens * (keys + normed) * size,
        mlp=tokens * mlp * size,
        weight_gradient=0 if frozen else mlp * language.hidden_size * size,
        context=_context_buffers(recipe, keys_of_slice=tokens * keys * size),
        frozen=frozen,
    )


def _context_buffers(recipe: Recipe, *, keys_of_slice: int) -> int:
    """Keys and values of other context-parallel ranks, and their gradients.

    A ring holds those that are used and those that arrive; the other schemes hold all.
    """
    cp = recipe.parallel.context_parallel_size
    if cp == 1:
        return 0
    return keys_of_slice * (4 if recipe.parallel.cp_comm_type == "p2p" else 2 * cp)
