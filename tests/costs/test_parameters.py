"""Numbers of parameters are those of the models that are built, and of published ones."""

import pytest

from megatron_vita.config import LanguageConfig, ModelConfig, VisionConfig
from megatron_vita.costs.memory.parameters import model_parameters, projector, vision_tower
from tests.costs.measured import QWEN_7B


def test_published_sizes_are_met() -> None:
    """Qwen2.5 (7.62 B, 14.77 B), InternViT-300M (304 M) and -6B-V2.5 (5.54 B) by their cards;
    Long-VITA's projector."""
    assert model_parameters(ModelConfig(text_only=True)) == pytest.approx(14.77e9, rel=1e-3)
    assert model_parameters(
        ModelConfig(text_only=True, language=LanguageConfig(**QWEN_7B))
    ) == pytest.approx(7.62e9, rel=1e-3)
    small = vision_tower(VisionConfig())
    assert small.split + small.whole == pytest.approx(304.0e6, rel=1e-3)
    large = vision_tower(
        VisionConfig(
            num_layers=45, hidden_size=3200, ffn_hidden_size=12800, num_attention_heads=25, normalization="RMSNorm",
            qk_layernorm=True, add_qkv_bias=False,
        )
    )  # fmt: skip
    assert large.split + large.whole == pytest.approx(5.54e9, rel=1e-3)
    assert projector(ModelConfig()) == pytest.approx(9.45e6, rel=1e-3)
