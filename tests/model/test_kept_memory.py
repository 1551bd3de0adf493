"""What stays in memory between the forward and backward passes is what the recipe says, byte by byte.

Attention is replaced by one that keeps queries, keys, values, its output and nothing else, as fused
attention does but for log-sum-exps; the `torch` backend's keeps copies in another order.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))
from synthetic import LENGTH, make_pack, share_of, tiny_recipe

from megatron_vita import platform
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups

FULL = {"recompute_granularity": "full"}
KEPT = FULL | {"recompute_keep_attention_layers": -1}
FROM_PIXELS = {"recompute_vision": True, "recompute_vision_method": "tiles"}
ROW = LENGTH * 32 * 4  # bytes of a hidden state of the tiny model


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        result = _attend(*parts)
        ctx.save_for_backward(*parts, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *parts, result = ctx.saved_tensors
        parts = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            again = _attend(*parts)
        assert torch.equal(again, result), "what attention kept is not what it made"
        return torch.autograd.grad(again, parts, grads[0])


def _attend(*parts: Tensor) -> Tensor:
    query, key, value = (part[:, 0].transpose(0, 1) for part in parts)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1).flatten(1).unsqueeze(1)


class FusedAttention(nn.Module):
    """megatron-core's `core_attention` slot."""

    def forward(self, *parts: Tensor, **_: Any) -> Tensor:
        """query, key, value -> [t, 1, heads * d]."""
        return _Attention.apply(*parts[:3])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made while it was active and are alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Notes the storages of all results."""
        results = function(*args, **(kwargs or {}))
        for result in torch.utils._pytree.tree_leaves(results):
            if (
                isinstance(result, Tensor)
                and result.untyped_storage().data_ptr() not in self._known
            ):
                reference = StorageWeakRef(result.untyped_storage())
                self._made[reference.cdata] = reference
        return results

    def count(self) -> int:
        """Of all storages that something still refers to."""
        alive = (ref for ref in self._made.values() if not ref.expired())
        return sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in alive)


def kept_bytes(**fields: Any) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Bytes between forward and backward; losses; gradients."""
    platform.initialize_process()
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    for layer in model.language_model.decoder.layers:
        layer.self_attention.core_attention = FusedAttention()
    batch = share_of(make_pack([(111, 7)], seed=1), groups.rank_layout(), first_stage=True)
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        frames=batch.frames, rows_per_tile=4, layout=groups.rank_layout(),
    )  # fmt: skip
    tiles = normalize(batch.tiles, "imagenet")
    with LiveBytes([*model.parameters(), tiles, pack.input_ids]) as live:
        losses = model(tiles, pack)
    between = live.count()
    losses.sum().backward()
    return between, losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def per_layer(**fields: Any) -> float:
    """What one layer more keeps, in hidden states."""
    more, fewer = (kept_bytes(num_layers=layers, **fields)[0] for layers in (5, 3))
    return (more - fewer) / 2 / ROW


@pytest.mark.parametrize(
    ("fields", "hidden_states"),
    [
        (FULL, 1),
        (KEPT, 2),
        (KEPT | {"mlp_chunk_tokens": 40}, 2),
        (FULL | {"recompute_keep_attention_layers": 1}, 1),
    ],
)
def test_a_layer_keeps_its_input_and_attention_output_at_most(
    fields: dict, hidden_states: int
) -> None:
    assert per_layer(**fields) == hidden_states


def test_layers_that_are_not_recomputed_keep_what_they_always_did() -> None:
    assert per_layer(**KEPT, recompute_num_layers=2) == per_layer() > 10


def test_nothing_of_the_tower_is_kept_where_it_goes_through_again_from_pixels() -> None:
    methods = ({}, {"recompute_vision": True}, FROM_PIXELS)
    small, large = (
        [kept_bytes(vision={"num_layers": layers}, **fields)[0] for fields in methods]
        for layers in (2, 4)
    )
    more, by_layer, from_pixels = (b - a for a, b in zip(small, large, strict=True))
    assert more > by_layer > from_pixels == 0
    assert small[1] > small[2]


@pytest.mark.parametrize("fields", [KEPT, KEPT | {"mlp_chunk_tokens": 40}, FROM_PIXELS])
def test_what_is_recomputed_changes_no_loss_and_no_gradient(fields: dict) -> None:
    _, expected_losses, expected = kept_bytes()
    _, losses, found = kept_bytes(**fields)
    assert torch.equal(losses, expected_losses)
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        difference = (found[name] - grad).norm()
        assert difference <= 1e-5 * grad.norm() + 1e-8 * total, name
