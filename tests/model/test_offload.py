"""Activations that wait on the host come back as they were, to whichever pass they belong."""

import logging

import pytest
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model import offload
from megatron_vita.model.build import build_model
from megatron_vita.model.offload import ActivationStore, LayerActivations
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.training.run.host_buffers import open_activation_store
from tests.functional.synthetic import make_pack, share_of, tiny_recipe

KEPT = {"recompute_granularity": "full", "recompute_keep_attention_layers": 2}
NUMBER = 1  # of a layer


def make(**fields: object) -> tuple[VitaModel, ActivationStore | None]:
    platform.initialize_process()
    recipe = tiny_recipe(**KEPT, **fields)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    return model, open_activation_store([model], recipe)


def losses_of(model: VitaModel, seed: int) -> Tensor:
    batch = share_of(make_pack([(111, 7)], seed=seed), groups.rank_layout(), first_stage=True)
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        frames=batch.frames, rows_per_tile=4, layout=groups.rank_layout(),
    )  # fmt: skip
    return model(normalize(batch.tiles, "imagenet"), pack)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_passes_in_flight_give_the_same_bits_in_any_order(
    fraction: float, order: list[int]
) -> None:
    found = []
    for share in (0.0, fraction):
        model, _ = make(activation_offload_fraction=share)
        losses = [losses_of(model, seed) for seed in (1, 2, 3)]
        for i in order:
            losses[i].sum().backward()
        found.append([*losses, *(p.grad for p in model.parameters())])
    for here, away in zip(*found, strict=True):
        assert torch.equal(here, away)


def test_nothing_grows_over_two_hundred_steps() -> None:
    model, store = make(activation_offload_fraction=1.0, num_layers=2, text_only=True)
    first = store.buffers.count
    for step in range(200):
        losses_of(model, step % 3).sum().backward()
        assert (
            store.buffers.count == first == sum(len(free) for free in store.buffers._free.values())
        )
    assert store._latest._sent == []
    assert store._latest._before is None


def test_passes_for_validation_send_nothing() -> None:
    model, store = make(activation_offload_fraction=1.0)
    with torch.no_grad():
        losses_of(model, 1)
    model.eval()
    losses_of(model, 1).sum().backward()
    assert store._latest.layer_number == 0


def sent(*tensors: Tensor) -> LayerActivations:
    activations = ActivationStore().open(NUMBER, offload=True)
    for tensor in tensors:
        activations.keep(tensor)
    activations.leave()
    return activations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_a_tensor_has_no_memory_on_the_device_meanwhile(dtype: torch.dtype) -> None:
    tensor = torch.arange(60).to(dtype).view(3, 1, 20)
    expected = tensor.clone()
    other = tensor.view(60)
    activations = sent(tensor)
    assert tensor.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    activations.arrive()
    assert torch.equal(tensor, expected)
    assert torch.equal(other, expected.view(60))


def test_autograd_takes_what_came_back_for_what_it_saved() -> None:
    weight = torch.randn(4, 5, requires_grad=True)
    rows = torch.randn(3, 4)
    expected = rows.clone()
    product = rows @ weight
    activations = sent(rows)
    activations.arrive()
    product.sum().backward()
    assert torch.equal(weight.grad, expected.sum(0)[:, None].expand(4, 5))


def test_part_of_a_larger_tensor_stays_where_it_is_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = torch.ones(4, 6)
    with caplog.at_level(logging.WARNING):
        sent(whole[1:]).arrive()
        sent(whole.t()).arrive()
    assert torch.equal(whole, torch.ones(4, 6))
    assert [record.getMessage() for record in caplog.records] == [
        "layer 1: part of a larger tensor stays on the device"
    ] * 2


def test_a_layer_fetches_what_the_layer_before_of_its_own_pass_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two passes of three layers, the last of which keeps its tensors here."""
    store = ActivationStore()
    fetched = []
    fetch = offload._SentTensor.fetch

    def noted(self: offload._SentTensor) -> None:
        if self._fetched is None:
            fetched.append(tuple(self._tensor.shape))
        fetch(self)

    monkeypatch.setattr(offload._SentTensor, "fetch", noted)
    passes: dict[int, list] = {}
    for name in (10, 20):
        passes[name] = []
        for layer in (5, 6, 7):
            activations = store.open(layer, offload=layer < 7)
            activations.keep(torch.zeros(name, layer))
            activations.leave()
            passes[name].append(activations)
    for name in (10, 20):
        for activations in reversed(passes[name]):
            activations.arrive()
            activations.fetch_before()
        assert fetched == [(name, 6), (name, 5)]
        fetched.clear()


def test_what_a_pass_began_is_not_taken_for_the_layer_before_of_another() -> None:
    store = ActivationStore()
    numbers = (3, 3, 4, 7, 3, 4)  # a stage of one layer; layers 3 and 4; chunks of a layer
    opened = [store.open(number, offload=True) for number in numbers]
    befores = [activations._before for activations in opened]
    assert befores == [None, None, opened[1], None, None, opened[4]]
