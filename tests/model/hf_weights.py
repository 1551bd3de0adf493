"""Copies weights of Hugging Face models into ours (one process), and their gradients into our shapes."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vita.model.vita import VitaModel

Names = Callable[[str], Tensor]


def language_tensors(
    get: Names, *, prefix: str, head: str, layers: int, groups: int, biased: bool = True
) -> dict[str, Tensor]:
    """Our `language_model` tensors from a Qwen2 model's; `get` gives a tensor (or gradient) by their name."""
    ours = {
        "embedding.word_embeddings.weight": get(f"{prefix}embed_tokens.weight"),
        "decoder.final_layernorm.weight": get(f"{prefix}norm.weight"),
        "output_layer.weight": get(head),
    }
    for i in range(layers):
        theirs, mine = f"{prefix}layers.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias") if biased else ("weight",):
            parts = [get(f"{theirs}self_attn.{x}_proj.{kind}").unflatten(0, (groups, -1)) for x in "qkv"]
            ours[f"{mine}self_attention.linear_qkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
        ours |= {
            f"{mine}input_layernorm.weight": get(f"{theirs}input_layernorm.weight"),
            f"{mine}pre_mlp_layernorm.weight": get(f"{theirs}post_attention_layernorm.weight"),
            f"{mine}self_attention.linear_proj.weight": get(f"{theirs}self_attn.o_proj.weight"),
            f"{mine}mlp.linear_fc1.weight": torch.cat([get(f"{theirs}mlp.{x}_proj.weight") for x in ("gate", "up")]),
            f"{mine}mlp.linear_fc2.weight": get(f"{theirs}mlp.down_proj.weight"),
        }
    return {f"language_model.{name}": tensor for name, tensor in ours.items()}


def vision_tensors(get: Names, *, layers: int, large: bool = False) -> dict[str, Tensor]:
    """Our vision tower's and projector's tensors from an InternVL model's; `large`: with InternViT-6B's norms."""
    theirs = "model.vision_tower.embeddings."
    ours = {
        "vision_model.embeddings.class_token": get(f"{theirs}cls_token"),
        "vision_model.embeddings.position_embedding": get(f"{theirs}position_embeddings"),
    }
    for kind in ("weight", "bias"):
        ours[f"vision_model.embeddings.patch_embedding.{kind}"] = get(f"{theirs}patch_embeddings.projection.{kind}")
        for mine, part in (("norm", "layer_norm"), ("fc1", "linear_1"), ("fc2", "linear_2")):
            ours[f"projector.{mine}.{kind}"] = get(f"model.multi_modal_projector.{part}.{kind}")
    for i in range(layers):
        theirs, mine = f"model.vision_tower.encoder.layer.{i}.", f"vision_model.layers.{i}."
        ours[f"{mine}scale1"], ours[f"{mine}scale2"] = get(f"{theirs}lambda_1"), get(f"{theirs}lambda_2")
        for kind in ("weight",) if large else ("weight", "bias"):
            qkv = [get(f"{theirs}attention.{x}_proj.{kind}") for x in "qkv"]
            ours |= {
                f"{mine}attention.qkv.{kind}": torch.stack(qkv),
                f"{mine}norm1.{kind}": get(f"{theirs}layernorm_before.{kind}"),
                f"{mine}norm2.{kind}": get(f"{theirs}layernorm_after.{kind}"),
            }
        for x in "qk" if large else "":
            ours[f"{mine}attention.{x}_norm.weight"] = get(f"{theirs}attention.{x}_norm.weight")
        for kind in ("weight", "bias"):
            ours |= {
                f"{mine}attention.projection.{kind}": get(f"{theirs}attention.projection_layer.{kind}"),
                f"{mine}mlp.fc1.{kind}": get(f"{theirs}mlp.fc1.{kind}"),
                f"{mine}mlp.fc2.{kind}": get(f"{theirs}mlp.fc2.{kind}"),
            }
    return ours


def copy_into(model: VitaModel, tensors: dict[str, Tensor]) -> None:
    """Sets the parameters of `model` that `tensors` names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights far from the first ones, so that no part of the model is a near no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + noise * (0.2 if parameter.dim() > 1 else 0.1))
