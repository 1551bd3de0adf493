"""Fields that GPU tests add to a tiny recipe: bf16, and sizes that fused kernels support."""

import torch

from megatron_vita import platform

SIZES = {
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
    "init_method_std": 0.05,
    "bf16": True,
}
TE = SIZES | {"attention_backend": "te"}
FA4 = SIZES | {"attention_backend": "fa4"}
TORCH = SIZES | {"attention_backend": "torch"}
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
TP = {"tensor_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
SP = TP | {"sequence_parallel": True}


def te_layouts() -> dict[str, dict]:
    """Layouts of all GPUs but for one of a single GPU, with each CP scheme of Transformer Engine
    that they reach."""
    layouts: dict[str, dict] = {"te": {}}
    if GPUS >= 2:
        layouts |= {"te tp2sp": SP} | {
            f"te cp2 {kind}": CP | {"cp_comm_type": kind} for kind in SCHEMES
        }
    if GPUS >= 4:
        hierarchy = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}
        layouts |= {"te cp4 a2a+p2p": {"context_parallel_size": 4} | hierarchy}
        layouts |= {f"te tp2sp-cp2 {kind}": SP | CP | {"cp_comm_type": kind} for kind in SCHEMES}
    return layouts


def fa4_layouts() -> dict[str, dict]:
    """Layouts of FlashAttention-4, where it can run."""
    if not GPUS or not platform.has_flash_attention_4():
        return {}
    if torch.cuda.get_device_capability() < (9, 0):
        return {}
    layouts = {"fa4": FA4}
    if GPUS >= 2:
        layouts |= {"fa4 tp2sp": FA4 | SP, "fa4 cp2": FA4 | CP}
    if GPUS >= 4:
        layouts |= {"fa4 cp4": FA4 | {"context_parallel_size": 4}, "fa4 tp2sp-cp2": FA4 | SP | CP}
    return layouts


SCHEMES = ("p2p", "all_gather", "a2a")


def canonical(name: str) -> str:
    """One name for the norm weights that Transformer Engine holds inside its linear layers."""
    return name.replace(
        "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
    ).replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def world_of(fields: dict) -> int:
    """Processes of a layout."""
    return fields.get("tensor_model_parallel_size", 1) * fields.get("context_parallel_size", 1)
