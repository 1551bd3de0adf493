"""Shapes of the models that benchmarks measure: fields that differ from a config's defaults, which are
Qwen2.5-14B and InternViT-300M."""

from typing import Any

QWEN2_7B: dict[str, Any] = {
    "num_layers": 28,
    "hidden_size": 3584,
    "ffn_hidden_size": 18944,
    "num_attention_heads": 28,
    "num_query_groups": 4,
}
QWEN3_8B: dict[str, Any] = {
    "num_layers": 36,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 151936,
    "qk_layernorm": True,
    "add_qkv_bias": False,
}
QWEN2_HALF_B: dict[str, Any] = {
    "num_layers": 24,
    "hidden_size": 896,
    "ffn_hidden_size": 4864,
    "num_attention_heads": 14,
    "num_query_groups": 2,
    "kv_channels": 64,
    "vocab_size": 151936,
    "untie_embeddings_and_output_weights": False,
}
TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "vocab_size": 512,
}
TINY_TOWER: dict[str, Any] = {
    "image_size": 56,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
}
