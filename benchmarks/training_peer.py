"""The peer of the training benchmark: transformers' InternVL of the same shape with FSDP2, activation
checkpointing and AdamW in fp32, and Liger's kernels where they are installed; for a recipe with
adapters, PEFT's on one GPU.

Started by training.py for cases with `peer: transformers`; a pack of one document on each GPU.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training_cases import Case
from training_measure import Measurement, PackContent, StepResult, work_through
from training_profile import profile_step
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl import InternVLVisionConfig
from transformers.models.qwen2 import Qwen2Config

from megatron_vita import platform
from megatron_vita.config import LanguageConfig, Recipe, VisionConfig, adapted_maps

IMAGE_TOKEN = 7
IMAGE_SHARE = 0.6
SCORED_SHARE = 0.1


def has_liger() -> bool:
    """Patch Liger's kernels into transformers' InternVL if they are installed; tells whether they
    are."""
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import apply_liger_kernel_to_internvl

        apply_liger_kernel_to_internvl()
        return True
    return False


def text_config(language: LanguageConfig, length: int) -> Qwen2Config:
    """The language model's shape."""
    return Qwen2Config(
        num_hidden_layers=language.num_layers,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_query_groups,
        head_dim=language.kv_channels,
        vocab_size=language.vocab_size,
        max_position_embeddings=length,
        rope_theta=language.rotary_base,
        use_cache=False,
    )


def vision_config(vision: VisionConfig) -> InternVLVisionConfig:
    """The tower's shape."""
    return InternVLVisionConfig(
        num_hidden_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        image_size=[vision.image_size] * 2,
        patch_size=[vision.patch_size] * 2,
    )


def build(recipe: Recipe) -> nn.Module:
    """The model, sharded over all GPUs, computing in bf16 and reducing gradients in fp32."""
    config = InternVLConfig(
        text_config=text_config(recipe.model.language, recipe.data.seq_length),
        vision_config=vision_config(recipe.model.vision),
        image_token_id=IMAGE_TOKEN,
    )
    torch.manual_seed(1)
    with platform.device():
        model = InternVLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if recipe.lora.rank:
        return with_adapters(model, recipe)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(platform.device().type, (dist.get_world_size(),))
    layers = [*model.model.vision_tower.encoder.layer, *model.model.language_model.layers]
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def with_adapters(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with PEFT's adapters in its language model, unsharded, in the type of the recipe."""
    # Imported here: only this comparison needs it.
    from peft import LoraConfig, get_peft_model

    adapted = adapted_maps(recipe.model, recipe.lora)
    pieces = [each.linear.pieces[i].name for each in adapted for i in each.chosen]
    names = sorted({name.rpartition(".")[2] for name in pieces})
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=int(recipe.lora.alpha),
        target_modules=rf".*language_model\..*\.({'|'.join(names)})",
    )
    whole = get_peft_model(model.to(type_of(recipe)), config, autocast_adapter_dtype=False)
    if not recipe.training.freeze_projector:
        for name, parameter in whole.named_parameters():
            if "multi_modal_projector" in name:
                parameter.requires_grad_()
    return whole


def type_of(recipe: Recipe) -> torch.dtype:
    """Type of weights and activations."""
    return torch.bfloat16 if recipe.training.bf16 else torch.float32


def make_inputs(recipe: Recipe) -> dict[str, Tensor]:
    """Ids and labels [1, T] with placeholders of `packs.py`'s share of image tokens, and pixels."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    length = recipe.data.seq_length
    vision = recipe.model.vision
    rows = vision.image_token_length
    vocabulary = recipe.model.language.vocab_size
    tiles = int(length * IMAGE_SHARE / rows)
    ids = torch.randint(IMAGE_TOKEN + 1, vocabulary, (length,), generator=generator)
    scored = torch.rand(length, generator=generator) < SCORED_SHARE
    labels = torch.where(scored, ids, -100)
    for tile in range(tiles):
        start = tile * (rows + 2) + 1
        ids[start : start + rows] = IMAGE_TOKEN
        labels[start : start + rows] = -100
    side = vision.image_size
    pixels = torch.rand(tiles, 3, side, side, generator=generator)
    inputs = {"input_ids": ids[None], "labels": labels[None], "pixel_values": pixels}
    return {name: value.to(platform.device()) for name, value in inputs.items()}


def measure(case: Case, out: Path) -> dict[str, Any]:
    """Run a case in the existing process group and return its result. Collective."""
    recipe = case.recipe()
    liger = has_liger()
    inputs = make_inputs(recipe)
    rows = int((inputs["labels"] != -100).sum())
    content = PackContent([case.tokens], len(inputs["pixel_values"]), rows)
    measurement = Measurement(case, out, content, liger=liger, estimated_gib=None)
    model = build(recipe)
    if recipe.lora.rank:  # no FSDP casts them
        inputs["pixel_values"] = inputs["pixel_values"].to(type_of(recipe))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=platform.on_cuda())
    measurement.note_static_memory()

    def step() -> StepResult:
        loss = model(**inputs).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return StepResult(loss.item(), _whole(norm))

    measurement.run(step)
    if case.profile:
        measurement.write(profile=profile_step(step))
    measurement.write(status="complete")
    return measurement.result


def _whole(norm: Tensor) -> float:
    """A norm of all ranks' shards as a number."""
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


if __name__ == "__main__":
    work_through(measure)
