"""Shapes of the models that serving is measured at."""

SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 16),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 128),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 128),
}
"""Layers, hidden size, feed-forward size, query heads, key-value heads, width of a head."""

ROWS_OF_FRAME = 258
"""Tokens of a frame: 256 placeholders between two marks."""


def causal_flops(shape: str, length: int) -> float:
    """Multiplications and additions of the language model over a prompt."""
    layers, hidden, ffn, heads, groups, width = SHAPES[shape]
    matrices = hidden * width * (2 * heads + 2 * groups) + 3 * hidden * ffn
    return layers * (2.0 * matrices * length + 2.0 * heads * width * length**2)
