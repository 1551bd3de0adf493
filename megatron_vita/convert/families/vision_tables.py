"""Tensor names of vision towers and projectors.

A table lists every tensor of its family; `vision_table` keeps those that a given tower has.
"""

from megatron_vita.config import ModelConfig, VisionConfig
from megatron_vita.convert.families.mapping import Rule, Stack, UnflattenQKV, Unsqueeze, expand, row


def _both(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(row(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias"))


def _qkv(names: str, kinds: tuple[str, ...] = ("weight", "bias")) -> tuple[Rule, ...]:
    """Rules that stack the tensors `names`, in which `{x}` stands for q, k and v."""
    return tuple(
        row(
            tuple(f"{names.replace('{x}', x)}.{kind}" for x in "qkv"),
            f"layers.{{i}}.attention.qkv.{kind}",
            Stack(),
        )
        for kind in kinds
    )


INTERNVIT_CHAT = (  # OpenGVLab's own layout, of InternViT and inside `internvl_chat`
    row("embeddings.class_embedding", "embeddings.class_token"),
    row("embeddings.position_embedding", "embeddings.position_embedding"),
    *_both("embeddings.patch_embedding", "embeddings.patch_embedding"),
    *_both("encoder.layers.{i}.norm1", "layers.{i}.norm1"),
    row("encoder.layers.{i}.attn.qkv.weight", "layers.{i}.attention.qkv.weight", UnflattenQKV()),
    row("encoder.layers.{i}.attn.qkv.bias", "layers.{i}.attention.qkv.bias", UnflattenQKV()),
    row("encoder.layers.{i}.attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    row("encoder.layers.{i}.attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *_both("encoder.layers.{i}.attn.proj", "layers.{i}.attention.projection"),
    row("encoder.layers.{i}.ls1", "layers.{i}.scale1"),
    *_both("encoder.layers.{i}.norm2", "layers.{i}.norm2"),
    *_both("encoder.layers.{i}.mlp.fc1", "layers.{i}.mlp.fc1"),
    *_both("encoder.layers.{i}.mlp.fc2", "layers.{i}.mlp.fc2"),
    row("encoder.layers.{i}.ls2", "layers.{i}.scale2"),
)

INTERNVIT_HF = (  # transformers' layout: `internvl_vision`, and inside `internvl`
    row("embeddings.cls_token", "embeddings.class_token"),
    row("embeddings.position_embeddings", "embeddings.position_embedding"),
    *_both("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    *_both("encoder.layer.{i}.layernorm_before", "layers.{i}.norm1"),
    *_qkv("encoder.layer.{i}.attention.{x}_proj"),
    row("encoder.layer.{i}.attention.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    row("encoder.layer.{i}.attention.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    *_both("encoder.layer.{i}.attention.projection_layer", "layers.{i}.attention.projection"),
    row("encoder.layer.{i}.lambda_1", "layers.{i}.scale1"),
    *_both("encoder.layer.{i}.layernorm_after", "layers.{i}.norm2"),
    *_both("encoder.layer.{i}.mlp.fc1", "layers.{i}.mlp.fc1"),
    *_both("encoder.layer.{i}.mlp.fc2", "layers.{i}.mlp.fc2"),
    row("encoder.layer.{i}.lambda_2", "layers.{i}.scale2"),
)

CLIP = (  # CLIP and SigLIP
    row("embeddings.class_embedding", "embeddings.class_token", Unsqueeze(2)),
    row("embeddings.position_embedding.weight", "embeddings.position_embedding", Unsqueeze(1)),
    *_both("embeddings.patch_embedding", "embeddings.patch_embedding"),
    *_both("pre_layrnorm", "embeddings.pre_norm"),
    *_both("encoder.layers.{i}.layer_norm1", "layers.{i}.norm1"),
    *_qkv("encoder.layers.{i}.self_attn.{x}_proj"),
    *_both("encoder.layers.{i}.self_attn.out_proj", "layers.{i}.attention.projection"),
    *_both("encoder.layers.{i}.layer_norm2", "layers.{i}.norm2"),
    *_both("encoder.layers.{i}.mlp.fc1", "layers.{i}.mlp.fc1"),
    *_both("encoder.layers.{i}.mlp.fc2", "layers.{i}.mlp.fc2"),
    *_both("post_layernorm", "post_norm"),
)

EVA = (  # EVA2-CLIP as CogVLM and GLM-4V carry it
    row("patch_embedding.cls_embedding", "embeddings.class_token", Unsqueeze(1)),
    row("patch_embedding.position_embedding.weight", "embeddings.position_embedding", Unsqueeze(1)),
    *_both("patch_embedding.proj", "embeddings.patch_embedding"),
    row(
        "transformer.layers.{i}.attention.query_key_value.weight",
        "layers.{i}.attention.qkv.weight",
        UnflattenQKV(),
    ),
    row(
        "transformer.layers.{i}.attention.query_key_value.bias",
        "layers.{i}.attention.qkv.bias",
        UnflattenQKV(),
    ),
    *_both("transformer.layers.{i}.attention.dense", "layers.{i}.attention.projection"),
    *_both("transformer.layers.{i}.input_layernorm", "layers.{i}.norm1"),
    *_both("transformer.layers.{i}.mlp.fc1", "layers.{i}.mlp.fc1"),
    *_both("transformer.layers.{i}.mlp.fc2", "layers.{i}.mlp.fc2"),
    *_both("transformer.layers.{i}.post_attention_layernorm", "layers.{i}.norm2"),
)

PROJECTOR_CHAT = (  # InternVL's `mlp1`
    *_both("mlp1.0", "projector.norm"),
    *_both("mlp1.1", "projector.fc1"),
    *_both("mlp1.3", "projector.fc2"),
)

PROJECTOR_LONG_VITA = (
    *_both("pre_proj_layernorm", "projector.norm"),
    row("mlp.0.weight", "projector.fc1.weight"),
    row("mlp.2.weight", "projector.fc2.weight"),
)

PROJECTOR_HF = (
    *_both("multi_modal_projector.layer_norm", "projector.norm"),
    *_both("multi_modal_projector.linear_1", "projector.fc1"),
    *_both("multi_modal_projector.linear_2", "projector.fc2"),
)


def vision_table(table: tuple[Rule, ...], config: VisionConfig, *, theirs: str = "") -> list[Rule]:
    """Mapping of a tower: the rules of `table` whose tensors it has, with `theirs` as prefix."""
    absent = _absent(config)
    kept = [rule for rule in table if not rule.ours.endswith(absent)]
    return list(expand(kept, layers=config.num_layers, theirs=theirs, ours="vision_model."))


def _absent(config: VisionConfig) -> tuple[str, ...]:
    """Suffixes of our names that a tower does not have."""
    rms = config.normalization == "RMSNorm"
    lacks = {
        "attention.qkv.bias": not config.add_qkv_bias,
        "embeddings.class_token": not config.class_token,
        "embeddings.patch_embedding.bias": not config.patch_bias,
        "embeddings.pre_norm.weight": not config.pre_norm,
        "embeddings.pre_norm.bias": not config.pre_norm,
        "post_norm.weight": not config.post_norm,
        "post_norm.bias": not config.post_norm,
        "norm1.bias": rms,
        "norm2.bias": rms,
        "attention.q_norm.weight": not config.qk_layernorm,
        "attention.k_norm.weight": not config.qk_layernorm,
    }
    return tuple(ending for ending, lacking in lacks.items() if lacking)


def projector_table(table: tuple[Rule, ...], model: ModelConfig) -> list[Rule]:
    """The rules of `table` whose tensors the projector has."""
    biased = model.projector.has_bias
    return [rule for rule in table if biased or not rule.ours.endswith(("fc1.bias", "fc2.bias"))]
