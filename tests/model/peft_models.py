"""Our runs with adapters beside models of PEFT, of the same weights."""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_vita import platform
from megatron_vita.config import LanguageConfig, Recipe, adapted_maps, linear_maps
from megatron_vita.convert.families.adapters import (
    join_adapter,
    join_norms,
)
from megatron_vita.model.quantized import unpacked_in_turn
from megatron_vita.parallel import groups
from megatron_vita.training.run.run import Run, assemble_run
from tests.functional.synthetic import ROWS, VOCAB, WIDE, tiny_recipe
from tests.model.hf_weights import copy_into, our_tensors, randomize

IMAGE_TOKEN = 0  # packs have other tokens
STEPS = 3
FROZEN = {
    "freeze_language_model": True,
    "freeze_vision_model": True,
    "freeze_projector": True,
}
IN_PEFT = {  # beginnings of our names of maps, and of PEFT's
    "model.layers.": "model.language_model.layers.",
    "vision_model.layers.": "model.vision_tower.encoder.layer.",
    "projector.fc": "model.multi_modal_projector.linear_",
}
CASES: dict[str, dict[str, Any]] = {
    "language": {"targets": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]},
    "some pieces": {"targets": ["q_proj", "v_proj", "up_proj", "layers.1.*.o_proj"], "rslora": True},
    "all parts": {"targets": ["*"], "alpha": 3.0},
    "tower beside": {"freeze_vision_model": False, "freeze_projector": False},
    "own rate": {"lr": 3e-3},
    "dora": {"targets": ["*"], "alpha": 3.0, "dora": True},
    "dora of pieces": {"targets": ["v_proj", "gate_proj", "down_proj", "key"], "dora": True},
    "quantized": {"quantize_base": "nf4", "targets": ["*"], "alpha": 3.0},
    "quantized twice": {
        "quantize_base": "nf4", "double_quant": True, "quantize_block_size": 32,
        "alpha": 3.0, "mlp_chunk_tokens": 48,
        "recompute_granularity": "full", "recompute_keep_attention_layers": -1,
    },
}  # fmt: skip


def recipe_of(case: str, **memory: object) -> Recipe:
    fields: dict[str, Any] = {
        "rank": 3,
        "alpha": 6.0,
        "global_batch_size": 1,
        **FROZEN,
        **CASES[case],
        **memory,
    }
    if "quantize_base" in fields:
        fields |= WIDE
    rate = fields.pop("lr", 0.0)
    return tiny_recipe(**fields).replaced({"model.projector.kind": "internvl", "lora.lr": rate})


def internvl(language: LanguageConfig) -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True, "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm", "use_qk_norm": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": language.hidden_size,
            "intermediate_size": language.ffn_hidden_size, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        image_token_id=IMAGE_TOKEN, image_seq_length=ROWS, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    randomize(model)
    # Sums over longer rows would amplify rounding from layer to layer.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.dim() > 1:
                parameter.mul_((32 / language.hidden_size) ** 0.5)
    return model


def in_peft(name: str) -> str:
    """PEFT's name of one of our maps."""
    for ours, theirs in IN_PEFT.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    if "vision_tower" in name:
        for part in ("query", "key", "value"):
            name = name.replace(f"attention.{part}", f"attention.{part[0]}_proj")
        name = name.replace("attention.projection", "attention.projection_layer")
    return name


def quantize_maps(model: torch.nn.Module, recipe: Recipe) -> None:
    """Replace the linear maps of the language model by what bitsandbytes makes of them."""
    lora = recipe.lora
    for linear in linear_maps(recipe.model):
        if linear.part == "language_model":
            for piece in linear.pieces:
                weight = model.get_parameter(f"{in_peft(piece.name)}.weight").data
                codes, state = quantize_4bit(
                    weight.clone(),
                    blocksize=lora.quantize_block_size,
                    compress_statistics=lora.double_quant,
                    quant_type="nf4",
                )
                weight.copy_(dequantize_4bit(codes, state))


def peft_model(model: torch.nn.Module, recipe: Recipe) -> PeftModel:
    names = [
        in_peft(adapted.linear.pieces[i].name)
        for adapted in adapted_maps(recipe.model, recipe.lora)
        for i in adapted.chosen
    ]
    lora = recipe.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=names,
        init_lora_weights=False,
    )
    return get_peft_model(model, config)


def adapters_in(theirs: PeftModel, recipe: Recipe, *, gradients: bool = False) -> dict[str, Tensor]:
    """PEFT's adapters, or their gradients, by our names of parameters."""
    parameters = dict(theirs.named_parameters())

    def get(name: str, kind: str) -> Tensor:
        found = parameters[f"base_model.model.{in_peft(name)}.lora_{kind}.default.weight"]
        return found.grad if gradients else found.detach()

    joined = {}
    for adapted in adapted_maps(recipe.model, recipe.lora):
        pieces = [adapted.linear.pieces[i].name for i in adapted.chosen]
        matrices = {name: (get(name, "A"), get(name, "B")) for name in pieces}
        a, b = join_adapter(adapted, matrices)
        joined[f"{adapted.linear.name}.lora.a"] = a
        joined[f"{adapted.linear.name}.lora.b"] = b
        if recipe.lora.dora:
            norms = {
                name: _norms_in(parameters, in_peft(name), gradients=gradients) for name in pieces
            }
            joined[f"{adapted.linear.name}.lora.d"] = join_norms(adapted, norms)
    return joined


def _norms_in(parameters: dict[str, Any], name: str, *, gradients: bool) -> Tensor:
    """The magnitudes of PEFT's map beyond the norms of its rows, or their gradients."""
    prefix = f"base_model.model.{name}"
    magnitude = parameters[f"{prefix}.lora_magnitude_vector.default.weight"]
    if gradients:
        return magnitude.grad
    return magnitude.detach() - parameters[f"{prefix}.base_layer.weight"].norm(dim=1)


def open_run(recipe: Recipe) -> Run:
    platform.initialize_process()
    groups.initialize_groups(recipe.parallel)
    return assemble_run(recipe)


def randomize_adapters(theirs: PeftModel) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def run_beside(recipe: Recipe) -> tuple[Run, PeftModel, dict[str, Tensor]]:
    """Our run and PEFT's model, of the same weights; and these of the base, by our names."""
    run = open_run(recipe)
    base = internvl(recipe.model.language)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    if recipe.lora.quantizes:
        quantize_maps(base, recipe)
    theirs = peft_model(base, recipe)
    randomize_adapters(theirs)
    start = our_tensors(weights.__getitem__, recipe.model, whole=True)
    tensors = start | adapters_in(theirs, recipe)
    for names in unpacked_in_turn(run.unwrapped_model):
        copy_into(run.unwrapped_model, {name: tensors.pop(name) for name in names})
    copy_into(run.unwrapped_model, tensors)
    run.optimizer.reload_model_params()
    return run, theirs, start
