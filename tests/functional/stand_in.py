"""The `fa4` backend without its GPU: the same packs and autograd function around a kernel in plain torch."""

import itertools

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_vita.model.backends.backends import FlashBackend, TorchBackend
from megatron_vita.model.backends.flash_attention import FlashAttention, SequenceBounds


class PlainKernel:
    """Attention by the textbook's formulas; backward is from the log-sum-exp, as real kernels do it."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: SequenceBounds
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel.forward`."""
        outs = []
        sums = []
        for rows, columns in _sequences(bounds):
            scores = _scores(query[rows], key[columns])
            lse = scores.logsumexp(-1)
            weights = (scores - lse[..., None]).exp()
            outs.append(torch.einsum("hqk,khd->qhd", weights, _repeated(value[columns], query)))
            sums.append(lse)
        return torch.cat(outs), torch.cat(sums, dim=1)

    def backward(
        self,
        grad: Tensor,
        *,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: SequenceBounds,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionKernel.backward`."""
        grads = tuple(torch.zeros_like(x) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5
        groups = key.shape[1]
        for rows, columns in _sequences(bounds):
            q = query[rows]
            g = grad[rows]
            k = _repeated(key[columns], query)
            v = _repeated(value[columns], query)
            weights = (_scores(q, key[columns]) - lse[:, rows, None]).exp()
            d_weights = torch.einsum("qhd,khd->hqk", g, v)
            delta = (g * out[rows]).sum(-1).T
            d_scores = weights * (d_weights - delta[..., None]) * scale
            grads[0][rows] = torch.einsum("hqk,khd->qhd", d_scores, k)
            for place, whole in (
                (grads[1], torch.einsum("hqk,qhd->khd", d_scores, q)),
                (grads[2], torch.einsum("hqk,qhd->khd", weights, g)),
            ):
                place[columns] = whole.unflatten(1, (groups, -1)).sum(2)
        return grads[0], grads[1], grads[2]


def _sequences(bounds: SequenceBounds) -> list[tuple[slice, slice]]:
    query = bounds.query.tolist()
    key = bounds.key.tolist()
    assert bounds.longest_query == max(b - a for a, b in itertools.pairwise(query))
    assert bounds.longest_key == max(b - a for a, b in itertools.pairwise(key))
    starts = zip(query, query[1:], key, key[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in starts]


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled scores [heads, q, k]; the last query sees the last key."""
    key = _repeated(key, query)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(key) - len(query))
    return scores.masked_fill(~seen, -torch.inf)


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


class StandIn(FlashBackend):
    """megatron-core's local layers in the place of Transformer Engine's."""

    fused = False

    def __init__(self) -> None:
        super().__init__(PlainKernel())

    def block_spec(self, num_layers: int, *, qk_layernorm: bool) -> TransformerBlockSubmodules:
        """The torch backend's layers with the core attention of `fa4`."""
        block = TorchBackend().block_spec(num_layers, qk_layernorm=qk_layernorm)
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = FlashAttention
        return block
