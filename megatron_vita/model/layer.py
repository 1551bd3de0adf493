"""A transformer layer with exact control over what it keeps between forward and backward.

With `x` the layer's input, one layer computes

    q, k, v = rotate(project(norm(x)))        a = attention(q, k, v)
    y = x + output_projection(a)              z = y + mlp(norm(y))

A recomputed layer keeps `x` alone. With attention kept, it keeps `x`, `a` and what attention itself
needs beside q, k and v (log-sum-exps), so that attention's forward pass runs once. y and all of the
MLP are computed again in the backward pass, the MLP over a bounded number of rows at a time and
without its last product, which only z needs. `x` and `a` stay on the device or wait on the host
(`offload.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vita.config import LayerMemory
from megatron_vita.model.lora import AdapterDropout, adapter_of
from megatron_vita.model.offload import ActivationStore, LayerActivations
from megatron_vita.model.pieces import PieceGradients, split_evenly
from megatron_vita.model.projection import without_output

QueryKeyValue = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Inputs of a layer beside the hidden state: rotary angles and attention metadata."""

    angles: Tensor
    documents: Any


class StepwiseAttention(SelfAttention):
    """megatron-core's self-attention with its steps as separate methods."""

    def project(self, hidden: Tensor, context: LayerContext) -> QueryKeyValue:
        """Compute rotated queries and keys, and values, of normalized rows [s, 1, H].

        Each has a storage of its own. Shapes are [t, heads, d] in THD layout, else [t, 1, heads,
        d].
        """
        query, key, value = self.get_query_key_value_tensors(hidden, None)
        if context.documents.qkv_format == "thd":
            query = query.squeeze(1)
            key = key.squeeze(1)
            value = value.squeeze(1)
        # One after the other, so that each unrotated tensor is freed before the next is made.
        query = self._rotate(query, context)
        key = self._rotate(key, context)
        # Values are a view of the joint projection, whose storage cannot be emptied for them alone.
        return query, key, value.clone(memory_format=torch.contiguous_format)

    def _rotate(self, part: Tensor, context: LayerContext) -> Tensor:
        bounds = None
        if context.documents.qkv_format == "thd":
            bounds = context.documents.cu_seqlens_q_padded
        rotated: Tensor = apply_rotary_pos_emb(
            part,
            context.angles,
            config=self.config,
            cu_seqlens=bounds,
            mscale=self._yarn_concentration_factor,
            cp_group=self.pg_collection.cp,
        )
        return rotated.contiguous()

    def attend(self, parts: QueryKeyValue, context: LayerContext) -> Tensor:
        """Return attention's output before its projection: [t, 1, heads * d]."""
        attended = self.core_attention(
            *parts,
            None,
            attn_mask_type=self.attn_mask_type,
            attention_bias=None,
            packed_seq_params=context.documents,
        )
        return attended.reshape(len(attended), 1, -1)


class RecomputingLayer(TransformerLayer):
    """megatron-core's layer, which keeps what `memory` says; without dropout or other
    randomness."""

    memory = LayerMemory()
    store: ActivationStore | None = None  # where some layers of the rank keep theirs on the host
    dropouts: tuple[AdapterDropout, ...] = ()  # of its adapters, where they drop anything
    passes = 0  # forward passes in training, which number the masks of adapters' dropout

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `add_mlp` and `project` compute these shapes only, and run twice without restoring a seed.
        config = self.config
        assert config.hidden_dropout == config.attention_dropout == 0.0, "nothing restores a seed"
        assert not config.add_bias_linear, "outputs of projections have no bias to be added"
        assert config.gated_linear_unit, "the MLP is SwiGLU"
        assert config.activation_func is F.silu, "the MLP is SwiGLU"

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer: rows [s, 1, H] -> [s, 1, H], and None for an unused context."""
        if self._trains:
            self.passes += 1
            self.begin_pass(self.passes)
        if not (self.memory.recompute and self._trains):
            return super().forward(
                hidden_states,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        assert rotary_pos_emb is not None, "in training, positions are the layer's business"
        context = LayerContext(angles=rotary_pos_emb, documents=packed_seq_params)
        return _RecomputedLayer.apply(hidden_states, self, context), None

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the MLP of a layer that is not recomputed as a whole, in pieces if asked, and
        recomputed by itself in training."""
        if not self.memory.mlp_rows:
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        # The pieces of training, so that validation and a reference need no more memory than it.
        if not torch.is_grad_enabled():
            return self.add_mlp(hidden_states)
        if self._trains and not self.memory.recompute:
            return _RecomputedMLP.apply(hidden_states, self)
        return super()._forward_mlp(hidden_states, *args, **kwargs)

    def begin_pass(self, number: int) -> None:
        """Set the number of the pass whose dropout masks adapters draw next."""
        for dropout in self.dropouts:
            dropout.begin(number)

    def open_activations(self) -> LayerActivations:
        """Return the record of one forward pass's kept activations."""
        if self.store is None:
            return LayerActivations(self.layer_number)
        return self.store.open(self.layer_number, offload=self.memory.offload)

    @property
    def _trains(self) -> bool:
        if not (self.training and torch.is_grad_enabled()):
            return False
        # Delayed scaling updates its scales in each forward pass, also in one that is run again.
        assert self.config.fp8_recipe != "delayed" or not self.config.fp8, "scales have a history"
        return True

    def project(self, hidden: Tensor, context: LayerContext) -> QueryKeyValue:
        """Compute queries, keys and values of the layer's input."""
        return self.self_attention.project(self.input_layernorm(hidden), context)

    def add_mlp(self, hidden: Tensor) -> Tensor:
        """Add the MLP's output to rows, a piece at a time, without recording for autograd."""
        result = torch.empty_like(hidden)
        for part, into in zip(self._pieces(hidden), self._pieces(result), strict=True):
            torch.add(part, self._mlp_branch(part), out=into)
        return result

    def backpropagate_mlp(self, hidden: Tensor, grad: Tensor) -> Tensor:
        """Compute the gradient of `add_mlp`'s input from that of its result, and those of the
        weights.

        Overwrites `grad` with the result where it is contiguous: nothing but this layer reads it.
        """
        gradients = PieceGradients([*self.pre_mlp_layernorm.parameters(), *self.mlp.parameters()])
        # An expanded gradient (of a sum) has no memory of its own to write to.
        result = grad.contiguous()
        for part, grad_part in zip(self._pieces(hidden), self._pieces(result), strict=True):
            rows = part.detach().requires_grad_()
            with torch.enable_grad():
                branch = self._mlp_branch_without_output(rows)
            (grad_rows,) = gradients.backward(branch, grad_part, rows)
            # The gradient goes around the MLP (the residual stream) and through it.
            grad_part.add_(grad_rows)
        gradients.deliver()
        return result

    def _mlp_branch(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.pre_mlp_layernorm(hidden))[0]

    def _mlp_branch_without_output(self, hidden: Tensor) -> Tensor:
        """Compute `_mlp_branch` for autograd, skipping the forward product of the last
        projection."""
        mlp = self.mlp
        config = self.config
        joined = mlp.linear_fc1(self.pre_mlp_layernorm(hidden))[0]
        if config.bias_activation_fusion:
            activated = bias_swiglu_impl(joined, None)
        else:
            gate, up = joined.chunk(2, dim=-1)
            activated = config.activation_func(gate) * up
        adapter = adapter_of(mlp.linear_fc2)
        # An 8-bit product belongs to Transformer Engine, with its backward pass.
        if config.fp8 or (adapter is not None and adapter.needs_output):
            return mlp.linear_fc2(activated)[0]
        # Under SP the skipped output would have been scattered along the rows.
        group = None
        if config.sequence_parallel:
            group = mlp.tp_group
        branch = without_output(activated, mlp.linear_fc2, group=group)
        if adapter is None:
            return branch
        return adapter(activated, branch)

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        return split_evenly(rows, at_most=self.memory.mlp_rows or len(rows))


class _RecomputedLayer(torch.autograd.Function):
    """Recomputation of a whole layer; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: RecomputingLayer, context: LayerContext) -> Tensor:
        ctx.layer = layer
        ctx.number = layer.passes
        ctx.context = context
        # The copy to the host starts here, so that it runs beside the whole forward pass.
        ctx.activations = activations = layer.open_activations()
        activations.keep(hidden)
        parts = layer.project(hidden, context)
        if layer.memory.keep_attention:
            ctx.attention = _KeptAttention(layer.self_attention, parts, context)
            attended = ctx.attention.output
            activations.keep(attended)
        else:
            ctx.attention = None
            attended = layer.self_attention.attend(parts, context)
        del parts  # free before the MLP, where memory is highest
        ctx.hidden = hidden.detach()
        result = layer.add_mlp(hidden + layer.self_attention.linear_proj(attended)[0])
        activations.leave()
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        context = ctx.context
        attention = ctx.attention
        activations = ctx.activations
        hidden = ctx.hidden.requires_grad_()
        layer.begin_pass(ctx.number)
        # `ctx` outlives this call: without these references, tensors are freed after their last
        # use.
        ctx.hidden = ctx.attention = ctx.activations = None
        activations.arrive()
        with torch.enable_grad(), layer.get_inner_quantization_context():
            if attention is None:
                attended = layer.self_attention.attend(layer.project(hidden, context), context)
            else:
                attended = attention.output.requires_grad_()
            projected = layer.self_attention.linear_proj(attended)[0]
        del attended
        with layer.get_inner_quantization_context():
            grad = layer.backpropagate_mlp(hidden.detach() + projected.detach(), grads[0])
        # The next layer's tensors come back beside attention's backward, not the MLP's: that takes
        # more memory, to which they would be added.
        activations.fetch_before()
        torch.autograd.backward(projected, grad)
        del projected
        # Kept attention: its backward needs no second forward, only queries, keys and values,
        # through whose projections its gradients continue to the layer's input.
        if attention is not None:
            with torch.enable_grad(), layer.get_inner_quantization_context():
                parts = layer.project(hidden, context)
            torch.autograd.backward(parts, attention.backpropagate(parts))
        # Of the residual stream, and of the input through attention.
        return grad.add_(hidden.grad), None, None


class _RecomputedMLP(torch.autograd.Function):
    """Recomputation of a layer's MLP, which keeps the MLP's input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: RecomputingLayer) -> Tensor:
        ctx.layer = layer
        ctx.number = layer.passes
        ctx.save_for_backward(hidden)
        return layer.add_mlp(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        layer = ctx.layer
        layer.begin_pass(ctx.number)
        # Backward passes run outside megatron-core's block, which enters the context forward.
        with layer.get_inner_quantization_context():
            return layer.backpropagate_mlp(hidden, grads[0]), None


class _KeptAttention:
    """One call of attention, recorded by autograd, without its queries, keys and values.

    Their storages are emptied after the forward pass, and filled again before attention's own
    backward pass reads them.
    """

    def __init__(
        self, attention: StepwiseAttention, parts: QueryKeyValue, context: LayerContext
    ) -> None:
        self._parts: QueryKeyValue = tuple(part.detach().requires_grad_() for part in parts)
        with torch.enable_grad():
            attended = attention.attend(self._parts, context)
        self._edge = torch.autograd.graph.get_gradient_edge(attended)
        self.output = attended.detach()
        for part in self._parts:
            part.untyped_storage().resize_(0)

    def backpropagate(self, parts: QueryKeyValue) -> tuple[Tensor, ...]:
        """Return the gradients of queries, keys and values, given these recomputed and
        `output.grad`, and free all that was kept."""
        for emptied, part in zip(self._parts, parts, strict=True):
            source = part.untyped_storage()
            emptied.untyped_storage().resize_(source.nbytes())
            emptied.untyped_storage().copy_(source)
            # Autograd goes back through the operations that made `parts`, which do not read them.
            source.resize_(0)
        gradients = torch.autograd.grad(self._edge, self._parts, self.output.grad)
        # Backward through the projections comes next, where memory is highest. The graph ends in
        # nodes that hold queries, keys and values.
        self._parts = ()
        del self._edge, self.output
        return gradients


def use_recomputing_layers(
    spec: ModuleSpec | TransformerBlockSubmodules,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Replace the layers of any backend's specification by `RecomputingLayer`, in place."""
    layers = [spec]
    if isinstance(spec, TransformerBlockSubmodules):
        layers = spec.layer_specs
    for layer in layers:
        layer.module = RecomputingLayer
        layer.submodules.self_attention.module = StepwiseAttention
    return spec
