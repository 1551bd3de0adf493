"""Adapters train as PEFT's beside the same weights in transformers' InternVL, in fp32."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from megatron_vita.config import DatasetConfig, Recipe, adapted_maps
from megatron_vita.convert.families.adapters import (
    join_adapter,
    merged_weight,
    split_adapter,
)
from megatron_vita.data.batch import Batch
from megatron_vita.media.normalize import normalize
from megatron_vita.model.dora import squared_norms
from megatron_vita.model.lora import adapters_of, adapters_off, row_owners
from megatron_vita.training.step.step import train_step, validate
from tests.functional.synthetic import IGNORED, LENGTH, ROWS, make_pack
from tests.model.peft_models import (
    CASES,
    IMAGE_TOKEN,
    STEPS,
    adapters_in,
    open_run,
    recipe_of,
    run_beside,
)


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


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_those_of_peft(case: str) -> None:
    recipe = recipe_of(case)
    run, theirs, start = run_beside(recipe)
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
