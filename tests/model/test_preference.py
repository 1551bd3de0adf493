"""DPO trains adapters as its formula does on PEFT's model, whose base is the reference, in fp32."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from megatron_vita.config import DatasetConfig, DpoConfig, LoraConfig, Recipe
from megatron_vita.data.batch import Batch
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.normalize import normalize
from megatron_vita.training.step.preference import pair_losses
from megatron_vita.training.step.step import train_step, validate
from tests.functional.synthetic import IGNORED, ROWS, make_pack, pair_up
from tests.model.peft_models import (
    IMAGE_TOKEN,
    adapters_in,
    open_run,
    recipe_of,
    run_beside,
)

LENGTHS = (50, 21, 13, 16)  # of two pairs' conversations, the second without media
TILES = (2, 2, 0, 0)
BETA = 0.7


def preferring(smoothing: float = 0.0) -> Recipe:
    held_out = [DatasetConfig(name="held out", shards="none")]
    dpo = {"dpo.beta": BETA, "dpo.label_smoothing": smoothing}
    return recipe_of("all parts").replaced(dpo | {"data.validation": held_out})


def pairs_pack(seed: int = 3) -> Batch:
    """A pack of two pairs, of which the second has weight 1."""
    pack = pair_up(make_pack(list(zip(LENGTHS, TILES, strict=True)), seed=seed))
    for start in pack.placements.tolist():
        pack.input_ids[start : start + ROWS] = IMAGE_TOKEN
    return pack


def log_probabilities(theirs: PeftModel, pack: Batch, recipe: Recipe) -> Tensor:
    """Sums by PEFT's model over the labels of each conversation, which it sees alone: [2, 2]."""
    sums = []
    bounds = pack.cu_seqlens.tolist()
    for start, length in zip(bounds, LENGTHS, strict=False):
        here = slice(start, start + length)
        inside = (pack.placements >= start) & (pack.placements < start + length)
        pixels = {}
        if inside.any():
            tiles = pack.tiles[inside]
            pixels["pixel_values"] = normalize(
                tiles, recipe.media.normalization, dtype=torch.float32
            )
        logits = theirs(input_ids=pack.input_ids[None, here], **pixels).logits[0]
        labels = pack.labels[here]
        sums.append(-F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
    return torch.stack(sums).view(2, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_on_pairs_has_the_loss_and_gradients_of_the_formula(smoothing: float) -> None:
    recipe = preferring(smoothing)
    run, theirs, _ = run_beside(recipe)
    pack = pairs_pack()
    assert pack.loss_weights is not None
    with torch.no_grad(), theirs.disable_adapter():
        reference = log_probabilities(theirs, pack, recipe)
    policy = log_probabilities(theirs, pack, recipe)
    ratios = policy[:, 0] - policy[:, 1] - (reference[:, 0] - reference[:, 1])
    losses = (
        -F.logsigmoid(BETA * ratios) * (1 - smoothing) - F.logsigmoid(-BETA * ratios) * smoothing
    )
    weights = pack.loss_weights[pack.document_starts[:2].long()]
    loss = (losses * weights).sum() / 2
    loss.backward()
    adapters = [p for name, p in theirs.named_parameters() if "lora_" in name]
    norm = torch.nn.utils.clip_grad_norm_(adapters, recipe.optimizer.clip_grad)
    held_out = validate(run, iter([pack]), num_microbatches=1)
    frozen = {
        n: p.clone() for n, p in run.unwrapped_model.named_parameters() if not p.requires_grad
    }
    metrics = train_step(run, iter([pack]))
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    parameters = dict(run.unwrapped_model.named_parameters())
    for name, grad in adapters_in(theirs, recipe, gradients=True).items():
        difference = (parameters[name].main_grad - grad).norm()
        assert difference <= 1e-5 * grad.norm(), name
    for name, before in frozen.items():
        assert torch.equal(parameters[name], before), name
    rewards = BETA * (policy - reference).detach()
    wanted = {
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float().mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }
    for found, part in ((metrics, "train"), (held_out, "validation")):
        assert found.loss == pytest.approx(loss.item(), rel=1e-5)
        for name, value in wanted.items():
            assert found.scalars()[f"{part}/{name}"] == pytest.approx(value.item(), rel=1e-4), name
    assert metrics.loss_tokens == int((pack.labels != IGNORED).sum())


def test_a_step_with_a_loss_that_is_no_number_is_skipped() -> None:
    run = open_run(preferring().replaced({"numerics.nonfinite_action": "skip"}))
    parameters = dict(run.unwrapped_model.named_parameters())
    before = {name: value.clone() for name, value in parameters.items() if value.requires_grad}
    weight = parameters["language_model.output_layer.weight"]
    with torch.no_grad():
        number = weight[5, 0].clone()
        weight[5, 0] = torch.nan
    metrics = train_step(run, iter([pairs_pack()]))
    with torch.no_grad():
        weight[5, 0] = number
    assert metrics.skipped
    for name, value in before.items():
        assert torch.equal(parameters[name], value), name
    assert not train_step(run, iter([pairs_pack()])).skipped


def test_new_adapters_prefer_nothing() -> None:
    run = open_run(preferring())
    metrics = train_step(run, iter([replace(pairs_pack(), loss_weights=None)]))
    assert metrics.loss == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    assert metrics.preferences["rewards/margins"] == 0


def test_slopes_are_the_derivatives_of_the_losses() -> None:
    policy = torch.tensor([[3.0, -1.0], [-40.0, 60.0], [0.0, 0.0]], dtype=torch.float64)
    policy.requires_grad_()
    found = pair_losses(policy, torch.zeros(3, 2), DpoConfig(beta=0.3, label_smoothing=0.1))
    (grad,) = torch.autograd.grad(found.losses.sum(), policy)
    slopes = found.slopes.detach()
    torch.testing.assert_close(grad, 0.3 * torch.stack([slopes, -slopes], dim=1))
    assert found.losses.isfinite().all()


@pytest.mark.parametrize("rejected", [None, [16, -1]])
def test_a_pack_without_pairs_is_refused_by_name(rejected: list[int] | None) -> None:
    run = open_run(preferring())
    starts = None if rejected is None else torch.tensor(rejected)
    pack = replace(pairs_pack(), rejected_starts=starts, sample_keys=["first", "second"])
    named = "first" if rejected is None else "second"
    with pytest.raises(DataError, match=rf"pack 4: sample {named} has no rejected answer"):
        train_step(run, iter([pack]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora": LoraConfig(), "training.freeze_projector": False}, r"needs adapters, .* set lora\.rank"),
        ({"lora.targets": ["q_proj"], "training.freeze_projector": False}, "the projector is trained fully"),
        ({"lora.targets": ["q_proj"], "training.freeze_vision_model": False}, "the vision_model is trained"),
        ({"data.isolate_documents": False}, "must not see each other"),
        ({"model.output.z_loss": 1e-4}, r"model\.output\.z_loss is 0\.0001"),
        ({"model.output.label_smoothing": 0.1}, r"model\.output\.label_smoothing is 0\.1"),
        ({"dpo.beta": 0.0, "dpo.label_smoothing": 0.1}, r"label_smoothing is 0\.1, which needs dpo\.beta"),
    ],
)  # fmt: skip
def test_what_would_change_the_reference_or_the_loss_is_refused(
    change: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        preferring().replaced(change)
