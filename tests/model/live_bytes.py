"""Bytes that a model keeps between its forward and backward passes.

Attention is replaced by one that keeps queries, keys, values, its output and nothing else, as fused
attention does but for log-sum-exps; the `torch` backend's keeps copies in another order.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vita import platform
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.media.normalize import normalize
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups
from megatron_vita.training.run.host_buffers import open_activation_store
from tests.functional.synthetic import LENGTH, make_pack, share_of, tiny_recipe

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
        """Bytes of all storages that are still referenced."""
        alive = (ref for ref in self._made.values() if not ref.expired())
        return sum(torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in alive)


def kept_bytes(**fields: Any) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Bytes kept between forward and backward, losses, and gradients."""
    platform.initialize_process()
    recipe = tiny_recipe(**fields)
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    store = open_activation_store([model], recipe)
    on_host = [buffer for free in store.buffers._free.values() for buffer in free] if store else []
    for layer in model.language_model.decoder.layers:
        layer.self_attention.core_attention = FusedAttention()
    batch = share_of(make_pack([(111, 7)], seed=1), groups.rank_layout(), first_stage=True)
    pack = slice_pack(
        batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, placements=batch.placements,
        frames=batch.frames, rows_per_tile=4, layout=groups.rank_layout(),
    )  # fmt: skip
    tiles = normalize(batch.tiles, "imagenet")
    with LiveBytes([*model.parameters(), *on_host, tiles, pack.input_ids]) as live:
        losses = model(tiles, pack)
    between = live.count()
    losses.sum().backward()
    return between, losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def per_layer(**fields: Any) -> float:
    """Memory that one more layer keeps, in hidden states."""
    more, fewer = (kept_bytes(num_layers=layers, **fields)[0] for layers in (5, 3))
    return (more - fewer) / 2 / ROW
