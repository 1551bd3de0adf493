"""The language model: megatron-core's embedding, transformer block and output layer, composed.

megatron-core's GPTModel is deprecated and its successor has no hook at the output, so its parts are
composed here, where positions and rows are explicit. No other file knows which parts those are.
Parameter names are GPTModel's, so checkpoints of either fit the other.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import LanguageConfig, OutputConfig
from megatron_vita.model.backends.backends import AttentionBackend
from megatron_vita.model.layer import use_recomputing_layers
from megatron_vita.model.output.output import OutputLayer, padded_vocabulary
from megatron_vita.model.quantized import use_quantized_linears
from megatron_vita.model.rotary import inverse_frequencies


class LanguageModel(LanguageModule):
    """A pipeline stage of a Qwen2-, Qwen3- or Llama-shaped decoder."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        shape: LanguageConfig,
        output: OutputConfig,
        backend: AttentionBackend,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        quantized: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.shape = shape
        self.backend = backend
        self.vp_stage = vp_stage
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = not shape.untie_embeddings_and_output_weights
        # Not a buffer, which `model.bfloat16()` would round: angles grow with the position, and at
        # 100K tokens would be wrong by whole turns.
        self.inverse_frequencies = inverse_frequencies(shape).to(platform.device())
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocabulary(shape.vocab_size, config.tensor_model_parallel_size),
                max_sequence_length=0,  # of learned positions, which there are none of
                position_embedding_type="rope",
            )
        layers = backend.block_spec(
            get_num_layers_to_build(config, vp_stage=vp_stage), qk_layernorm=shape.qk_layernorm
        )
        if quantized:
            layers = use_quantized_linears(layers)
        self.decoder = TransformerBlock(
            config,
            spec=use_recomputing_layers(layers),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = OutputLayer(
                config,
                vocab_size=shape.vocab_size,
                options=output,
                owns_weight=not (pre_process and self.share_embeddings_and_output_weights),
            )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the previous stage's output, as megatron-core's schedules pass it."""
        # Some schedules pass a list, of one tensor for a decoder.
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed the tokens of this rank's part of the sequence: ids [t] -> [t / TP, H], also
        without SP."""
        x = self.embedding(input_ids[None], None)
        # Split over TP without SP as well: each feature row is then written by exactly one rank,
        # and its gradient is counted once.
        if not self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return x.squeeze(1)

    def decode(self, embeddings: Tensor | None, *, cu_seqlens: Tensor) -> Tensor:
        """Run this stage's layers.

        Args:
            embeddings: rows [t / TP, H] on the first stage, None after it.
            cu_seqlens: bounds of the documents [D+1], on the host.

        Returns:
            Hidden state [t / TP, 1, H] with SP, [t, 1, H] without.
        """
        if embeddings is not None:
            embeddings = embeddings.unsqueeze(1)
            # Recomputed layers and pipeline stages go back only through an input with a gradient,
            # which nothing before adapters may have.
            if self.training and torch.is_grad_enabled() and not embeddings.requires_grad:
                embeddings.requires_grad_()
            if not self.config.sequence_parallel:
                # Without SP all TP ranks run the same rows and receive the same gradient, of which
                # each takes its part: a sum over TP would multiply it by the number of ranks.
                embeddings = gather_from_sequence_parallel_region(
                    embeddings, tensor_parallel_output_grad=False, group=self.tp_group
                )
        documents, angles = self.backend.attention_metadata(
            cu_seqlens, inverse_frequencies=self.inverse_frequencies
        )
        return self.run_layers(embeddings, attention=documents, angles=angles)

    def run_layers(
        self, hidden: Tensor | None, *, attention: Any, angles: Tensor | None = None
    ) -> Tensor:
        """Run this stage's layers on rows [t, 1, H] with given attention metadata.

        Args:
            hidden: rows on the first stage, None after it.
            attention: metadata for the layers' core attention.
            angles: rotary angles [t, 1, 1, d]; None where core attention rotates queries and keys.
        """
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=attention,
        )

    def embed_rows(self, input_ids: Tensor) -> Tensor:
        """Embed tokens on every TP rank, for serving: ids [t] -> [t, 1, H]."""
        return self.embedding(input_ids[None], None)

    def project(self, hidden: Tensor) -> Tensor:
        """Compute logits [L, V] of rows [L, H] that every TP rank has, for serving."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = None
        return self.output_layer.project(hidden, weight=weight)

    def output(
        self,
        hidden: Tensor,
        *,
        rows: Tensor,
        labels: Tensor | None = None,
        row_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Compute losses [L] or logits [L, V] of rows of the slice; see `OutputLayer.forward`."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = None
        return self.output_layer(
            hidden, rows=rows, labels=labels, row_scale=row_scale, weight=weight
        )
