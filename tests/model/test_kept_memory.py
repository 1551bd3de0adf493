"""Memory kept between the forward and backward passes is what the recipe says, byte by byte."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_vita.model import layer
from tests.model.live_bytes import ROW, kept_bytes, per_layer

FULL = {"recompute_granularity": "full"}
KEPT = FULL | {"recompute_keep_attention_layers": -1}
FROM_PIXELS = {"recompute_vision": True, "recompute_vision_method": "tiles"}
OFFLOADED = {"activation_offload_fraction": 1.0}


@pytest.mark.parametrize(
    ("fields", "hidden_states"),
    [
        (FULL, 1),
        (KEPT, 2),
        (KEPT | {"mlp_chunk_tokens": 40}, 2),
        (FULL | {"recompute_keep_attention_layers": 1}, 1),
        (FULL | OFFLOADED, 0),
        (KEPT | OFFLOADED, 0),
    ],
)
def test_a_layer_keeps_its_input_and_attention_output_at_most(
    fields: dict, hidden_states: int
) -> None:
    assert per_layer(**fields) == hidden_states


def test_the_first_layers_of_a_stage_are_offloaded() -> None:
    here, half = (
        kept_bytes(**KEPT, activation_offload_fraction=fraction)[0] for fraction in (0, 0.3)
    )
    assert here - half == 2 * 2 * ROW  # of four layers, 0.3 are two


def test_layers_that_are_not_recomputed_keep_what_they_always_did() -> None:
    assert per_layer(**KEPT, recompute_num_layers=2) == per_layer() > 10


def test_nothing_of_the_tower_is_kept_where_it_goes_through_again_from_pixels() -> None:
    methods: tuple[dict, ...] = ({}, {"recompute_vision": True}, FROM_PIXELS)
    small, large = (
        [kept_bytes(vision={"num_layers": layers}, **fields)[0] for fields in methods]
        for layers in (2, 4)
    )
    more, by_layer, from_pixels = (b - a for a, b in zip(small, large, strict=True))
    assert more > by_layer > from_pixels == 0
    assert small[1] > small[2]


@pytest.mark.parametrize(
    "fields", [KEPT, KEPT | {"mlp_chunk_tokens": 40}, FROM_PIXELS, KEPT | OFFLOADED]
)
def test_what_is_recomputed_changes_no_loss_and_no_gradient(fields: dict) -> None:
    _, expected_losses, expected = kept_bytes()
    _, losses, found = kept_bytes(**fields)
    assert torch.equal(losses, expected_losses)
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        difference = (found[name] - grad).norm()
        assert difference <= 1e-5 * grad.norm() + 1e-8 * total, name


def test_attention_frees_what_it_kept_before_its_projections_go_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed = []
    backpropagate = layer._KeptAttention.backpropagate

    def watched(self: layer._KeptAttention, parts: layer.QueryKeyValue) -> tuple:
        kept = [StorageWeakRef(x.untyped_storage()) for x in (*self._parts, self.output)]
        gradients = backpropagate(self, parts)
        freed.append([reference.expired() for reference in kept])
        return gradients

    monkeypatch.setattr(layer._KeptAttention, "backpropagate", watched)
    kept_bytes(**KEPT, num_layers=2)
    assert freed == [[True] * 4] * 2
