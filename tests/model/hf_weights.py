"""Copies weights of Hugging Face models into ours (one process), and their gradients into our
shapes."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vita.config import ModelConfig
from megatron_vita.convert.families.folder_formats import CAUSAL, INTERNVL_HF
from megatron_vita.model.vita import VitaModel

_IN_MEMORY = {  # beginnings of names in files, and in transformers' models
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
_LAYERS = {  # ends of names in checkpoints, and in a model of the `torch` backend
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def our_tensors(
    get: Callable[[str], Tensor], shapes: ModelConfig, *, whole: bool
) -> dict[str, Tensor]:
    """Our tensors by the conversion's tables; `get` gives a tensor (or gradient) by transformers'
    name.

    `whole`: of an InternVL model, else of a language model.
    """
    ours = {}
    for rule in (INTERNVL_HF if whole else CAUSAL).table(shapes):
        name = rule.ours
        for stored, ending in _LAYERS.items():
            name = name.replace(stored, ending)
        ours[name] = rule.reshape.join(
            [get(_in_memory(theirs) if whole else theirs) for theirs in rule.theirs]
        )
    return ours


def _in_memory(name: str) -> str:
    return next(
        new + name.removeprefix(old) for old, new in _IN_MEMORY.items() if name.startswith(old)
    )


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
