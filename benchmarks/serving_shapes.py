"""Shapes of the models that serving is measured at."""

from model_shapes import QWEN2_7B

from megatron_vita.config import LanguageConfig

SHAPES = {
    "tiny": LanguageConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=1024,
    ),
    "qwen2.5-7b": LanguageConfig(**QWEN2_7B),
    "qwen2.5-14b": LanguageConfig(),
}

ROWS_OF_FRAME = 258
"""Tokens of a frame: 256 placeholders between two marks."""


def causal_flops(shape: str, length: int) -> float:
    """Multiplications and additions of the language model over a prompt."""
    model = SHAPES[shape]
    queries = model.num_attention_heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels
    attention = model.hidden_size * (2 * queries + 2 * keys)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (2.0 * (attention + mlp) * length + 2.0 * queries * length**2)
