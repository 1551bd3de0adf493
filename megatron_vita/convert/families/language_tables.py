"""Tensor names of language models. Qwen2, Qwen2.5, Qwen3, Llama and SmolLM2 share them and differ
in which of them exist.

Our names are those of GPTModel in checkpoints, where a norm belongs to the linear layer after it.
"""

from megatron_vita.config import LanguageConfig
from megatron_vita.convert.families.mapping import Concat, FusedQKV, Reshape, Rule, expand, row


def language_table(
    shape: LanguageConfig, *, theirs: str = "model.", head: str = "lm_head."
) -> list[Rule]:
    """Mapping of a language model; `theirs` and `head` prefix the names on their side."""
    layers = [
        *_layer(
            FusedQKV(shape.num_query_groups, shape.num_attention_heads // shape.num_query_groups)
        )
    ]
    # The table lists all tensors of the families; those that the shape lacks are dropped.
    if not shape.add_qkv_bias:
        layers = [rule for rule in layers if not rule.ours.endswith("linear_qkv.bias")]
    if not shape.qk_layernorm:
        layers = [
            rule
            for rule in layers
            if not rule.ours.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        ]
    ends = [
        row("embed_tokens.weight", "embedding.word_embeddings.weight"),
        row("norm.weight", "decoder.final_layernorm.weight"),
    ]
    rules = list(
        expand([*ends, *layers], layers=shape.num_layers, theirs=theirs, ours="language_model.")
    )
    if shape.untie_embeddings_and_output_weights:
        rules.append(row(f"{head}weight", "language_model.output_layer.weight"))
    return rules


def _layer(qkv: Reshape) -> tuple[Rule, ...]:
    def parts(kind: str) -> tuple[str, ...]:
        return tuple(f"layers.{{i}}.self_attn.{x}_proj.{kind}" for x in "qkv")

    gate_and_up = ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up_proj.weight")
    attention = "decoder.layers.{i}.self_attention."
    mlp = "decoder.layers.{i}.mlp."
    return (
        # Transformer Engine fuses a norm with the linear layer that follows, hence our names of
        # norms.
        row("layers.{i}.input_layernorm.weight", f"{attention}linear_qkv.layer_norm_weight"),
        row(parts("weight"), f"{attention}linear_qkv.weight", qkv),
        row(parts("bias"), f"{attention}linear_qkv.bias", qkv),
        row("layers.{i}.self_attn.q_norm.weight", f"{attention}q_layernorm.weight"),
        row("layers.{i}.self_attn.k_norm.weight", f"{attention}k_layernorm.weight"),
        row("layers.{i}.self_attn.o_proj.weight", f"{attention}linear_proj.weight"),
        row("layers.{i}.post_attention_layernorm.weight", f"{mlp}linear_fc1.layer_norm_weight"),
        row(gate_and_up, f"{mlp}linear_fc1.weight", Concat()),
        row("layers.{i}.mlp.down_proj.weight", f"{mlp}linear_fc2.weight"),
    )
