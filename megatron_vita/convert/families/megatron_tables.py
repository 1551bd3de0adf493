"""Tensor names in Megatron checkpoints: those of GPTModel, and of Long-VITA's vision tower and
projector.

Long-VITA's names are known from the description of its converters. Only the ends of names are
relied on, not the prefixes.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_vita.config import ModelConfig, VisionConfig
from megatron_vita.convert.families.language_tables import language_table
from megatron_vita.convert.families.mapping import UNCHANGED, Reshape, Rule, Unsqueeze, expand, row
from megatron_vita.convert.families.vision_tables import vision_table

VISION = "external_feature_model."


@dataclass(frozen=True)
class PerHeadQKV(Reshape):
    """Query, key and value interleaved head by head, as [3, heads * d, ...]."""

    heads: int

    def join(self, parts: list[Tensor]) -> Tensor:
        """See Reshape."""
        return parts[0].unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(1, 2)

    def split(self, whole: Tensor) -> list[Tensor]:
        """See Reshape."""
        return [whole.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(0, 2)]


def gpt_table(model: ModelConfig) -> list[Rule]:
    """Mapping of a GPTModel, whose names are ours."""
    ours = [rule.ours for rule in language_table(model.language)]
    # Tensors are fused alike on both sides, so that nothing is reshaped.
    return [Rule((name.removeprefix("language_model."),), name, UNCHANGED) for name in ours]


def long_vita_table(model: ModelConfig) -> list[Rule]:
    """Mapping of a Long-VITA checkpoint, for names as `RanksSource` normalizes them."""
    tower = vision_table(_tower(model.vision), model.vision)
    rules = [
        Rule(tuple(VISION + name for name in rule.theirs), rule.ours, rule.reshape)
        for rule in tower
    ]
    return [*gpt_table(model), *rules, *expand(_PROJECTOR, layers=0, theirs=VISION)]


_PROJECTOR = (
    row("pre_proj_layernorm.weight", "projector.norm.weight"),
    row("pre_proj_layernorm.bias", "projector.norm.bias"),
    # Long-VITA's projector has no biases.
    row("linear_fc1.weight", "projector.fc1.weight"),
    row("linear_fc2.weight", "projector.fc2.weight"),
)


def _tower(config: VisionConfig) -> tuple[Rule, ...]:
    attention = "decoder.layers.{i}.self_attention."
    mlp = "decoder.layers.{i}.mlp."
    heads = PerHeadQKV(config.num_attention_heads)
    return (
        row("class_token", "embeddings.class_token"),
        row("position_embeddings.weight", "embeddings.position_embedding", Unsqueeze(1)),
        row("conv1.weight", "embeddings.patch_embedding.weight"),
        row("conv1.bias", "embeddings.patch_embedding.bias"),
        row(f"{attention}linear_qkv.layer_norm_weight", "layers.{i}.norm1.weight"),
        row(f"{attention}linear_qkv.layer_norm_bias", "layers.{i}.norm1.bias"),
        row(f"{attention}linear_qkv.weight", "layers.{i}.attention.qkv.weight", heads),
        row(f"{attention}linear_qkv.bias", "layers.{i}.attention.qkv.bias", heads),
        row(f"{attention}q_layernorm.weight", "layers.{i}.attention.q_norm.weight"),
        row(f"{attention}k_layernorm.weight", "layers.{i}.attention.k_norm.weight"),
        row(f"{attention}linear_proj.weight", "layers.{i}.attention.projection.weight"),
        row(f"{attention}linear_proj.bias", "layers.{i}.attention.projection.bias"),
        row("decoder.layers.{i}.ls1", "layers.{i}.scale1"),
        row(f"{mlp}linear_fc1.layer_norm_weight", "layers.{i}.norm2.weight"),
        row(f"{mlp}linear_fc1.layer_norm_bias", "layers.{i}.norm2.bias"),
        row(f"{mlp}linear_fc1.weight", "layers.{i}.mlp.fc1.weight"),
        row(f"{mlp}linear_fc1.bias", "layers.{i}.mlp.fc1.bias"),
        row(f"{mlp}linear_fc2.weight", "layers.{i}.mlp.fc2.weight"),
        row(f"{mlp}linear_fc2.bias", "layers.{i}.mlp.fc2.bias"),
        row("decoder.layers.{i}.ls2", "layers.{i}.scale2"),
    )
