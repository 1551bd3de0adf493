"""Adapters train as PEFT's beside the same weights in transformers' InternVL, in fp32."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_vita import platform
from megatron_vita.config import DatasetConfig, Recipe, adapted_maps
from megatron_vita.convert.families.adapters import (
    join_adapter,
    join_norms,
    merged_weight,
    split_adapter,
)
from megatron_vita.data.batch import Batch
from megatron_vita.media.normalize import normalize
from megatron_vita.model.dora import squared_norms
from megatron_vita.model.lora import adapters_of, adapters_off, row_owners
from megatron_vita.parallel import groups
from megatron_vita.training.run import Run, assemble_run
from megatron_vita.training.step import train_step, validate
from tests.functional.synthetic import IGNORED, LENGTH, ROWS, VOCAB, make_pack, tiny_recipe
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
    rate = fields.pop("lr", 0.0)
    return tiny_recipe(**fields).replaced({"model.projector.kind": "internvl", "lora.lr": rate})


def internvl() -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True, "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm", "use_qk_norm": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        image_token_id=IMAGE_TOKEN, image_seq_length=ROWS, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    randomize(model)
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


def packs(step: int) -> Iterator[Batch]:
    pack = make_pack([(LENGTH, 3)], seed=2 * step + 2)
    for start in pack.placements.tolist():
        pack.input_ids[start : start + ROWS] = IMAGE_TOKEN
    yield replace(pack, loss_weights=None)


def their_loss(theirs: PeftModel, pack: Batch, recipe: Recipe) -> Tensor:
    pixels = normalize(pack.tiles, recipe.media.normalization, dtype=torch.float32)
    logits = theirs(input_ids=pack.input_ids[None], pixel_values=pixels).logits[0]
    return F.cross_entropy(logits, pack.labels, ignore_index=IGNORED)


def their_steps(theirs: PeftModel, recipe: Recipe) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Losses and gradients of PEFT's model, trained by torch's own loop."""
    for name, parameter in theirs.named_parameters():
        in_part = any(part in name for part in ("vision_tower", "multi_modal_projector"))
        if in_part and not recipe.training.freeze_projector:
            parameter.requires_grad_()
    adapters = [p for name, p in theirs.named_parameters() if "lora_" in name]
    others = [p for name, p in theirs.named_parameters() if "lora_" not in name and p.requires_grad]
    groups_of_rates = [{"params": adapters, "lr": recipe.lora.lr or recipe.optimizer.lr}]
    if others:
        groups_of_rates.append({"params": others, "lr": recipe.optimizer.lr})
    optimizer = torch.optim.AdamW(
        groups_of_rates, betas=(0.9, 0.999), eps=recipe.optimizer.adam_eps, weight_decay=0.0
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        (pack,) = packs(step)
        loss = their_loss(theirs, pack, recipe)
        loss.backward()
        # In place, as megatron-core's optimizer does.
        torch.nn.utils.clip_grad_norm_([*adapters, *others], recipe.optimizer.clip_grad)
        gradients = adapters_in(theirs, recipe, gradients=True)
        optimizer.step()
        yield loss.item(), gradients


def open_run(recipe: Recipe) -> Run:
    platform.initialize_process()
    groups.initialize_groups(recipe.parallel)
    return assemble_run(recipe)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_those_of_peft(case: str) -> None:
    recipe = recipe_of(case)
    run = open_run(recipe)
    base = internvl()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    theirs = peft_model(base, recipe)
    randomize_adapters(theirs)
    start = our_tensors(weights.__getitem__, recipe.model, whole=True)
    copy_into(run.unwrapped_model, start | adapters_in(theirs, recipe))
    run.optimizer.reload_model_params()
    parameters = dict(run.unwrapped_model.named_parameters())
    for step, (loss, gradients) in enumerate(their_steps(theirs, recipe)):
        metrics = train_step(run, packs(step))
        assert metrics.loss == pytest.approx(loss, rel=1e-5)
        for name, grad in gradients.items():
            actual = parameters[name].main_grad
            assert (actual - grad).norm() <= 1e-5 * grad.norm(), f"step {step}, {name}"
    for name, expected in adapters_in(theirs, recipe).items():
        torch.testing.assert_close(parameters[name], expected, atol=1e-5, rtol=0, msg=name)
    frozen = {n for n, p in parameters.items() if not p.requires_grad}
    assert any("decoder" in name for name in frozen)
    for name in frozen:
        assert torch.equal(parameters[name], start[name]), name


def randomize_adapters(theirs: PeftModel) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_new_adapters_change_nothing_and_have_the_same_numbers_at_each_call() -> None:
    run = open_run(recipe_of("all parts"))
    again = open_run(recipe_of("all parts"))
    other = dict(adapters_of(again.unwrapped_model))
    adapters = dict(adapters_of(run.unwrapped_model))
    assert (
        len(adapters) == len(adapted_maps(run.recipe.model, run.recipe.lora)) == 2 * 4 + 2 + 4 * 4
    )
    for name, adapter in adapters.items():
        assert torch.equal(adapter.a, other[name].a)
        assert not adapter.b.any()
        bound = adapter.a.shape[1] ** -0.5
        assert 0.8 * bound < adapter.a.abs().max() <= bound


def test_a_new_adapter_with_norms_changes_nothing_in_half_precision() -> None:
    held_out = [DatasetConfig(name="held out", shards="none")]
    recipe = recipe_of("dora").replaced({"training.bf16": True, "data.validation": held_out})
    run = open_run(recipe)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in run.unwrapped_model.named_parameters():
            if name.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=generator))
    (pack,) = packs(0)
    with_norms = validate(run, iter([pack]), num_microbatches=1)
    with adapters_off(run.unwrapped_models):
        assert validate(run, iter([pack]), num_microbatches=1).loss == with_norms.loss


def test_rows_that_are_zero_stay_zero_in_merged_weights() -> None:
    recipe = recipe_of("dora")
    adapted = adapted_maps(recipe.model, recipe.lora)[0]
    generator = torch.Generator().manual_seed(6)
    rows = sum(piece.outputs for piece in adapted.linear.pieces)
    weight, update = torch.randn(2, rows, adapted.linear.inputs, generator=generator)
    weight[0] = update[0] = 0.0
    update[1] = -weight[1]
    change = torch.rand(row_owners(adapted.linear).shape, generator=generator)
    merged = merged_weight(adapted, weight, update, change=change)
    assert not merged[:2].any()
    wanted = (weight.norm(dim=1) + change.flatten())[2:]
    torch.testing.assert_close(merged[2:].norm(dim=1), wanted)


def test_norms_need_no_copy_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, a, b = (
        torch.randn(*shape, generator=generator) for shape in ((5000, 40), (6, 40), (5000, 6))
    )
    found = squared_norms(weight, a, b)
    torch.testing.assert_close(found[0], weight.square().sum(1))
    torch.testing.assert_close(found[1], (weight + b @ a).square().sum(1))


def test_splitting_an_adapter_into_pieces_inverts_joining_them() -> None:
    recipe = recipe_of("some pieces")
    for adapted in adapted_maps(recipe.model, recipe.lora):
        pieces = [adapted.linear.pieces[i] for i in adapted.chosen]
        matrices = {
            piece.name: (torch.randn(3, adapted.linear.inputs), torch.randn(piece.outputs, 3))
            for piece in pieces
        }
        found = split_adapter(adapted, *join_adapter(adapted, matrices))
        assert found.keys() == matrices.keys()
        for name, (a, b) in matrices.items():
            assert torch.equal(found[name][0], a)
            assert torch.equal(found[name][1], b)
