"""FlashAttention-4's kernels (`flash_attn.cute`) behind the interface of `flash_attention.py`.

Imported only where FlashAttention-4 is used. Its public function is an autograd function that would
keep gathered keys and values, so the two functions beneath it are called; requirements-gpu.txt
names the version that has them.
"""

import os
from itertools import accumulate
from typing import Any

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from megatron_vita import platform
from megatron_vita.errors import PlatformError
from megatron_vita.model.backends.flash_attention import SequenceBounds
from megatron_vita.platform.pinned import to_device

LARGEST_ERROR = 0.02
"""Largest error of outputs and gradients in bf16, relative to their norm: correct kernels stay below 0.005."""


class FlashAttention4:
    """Kernels for Hopper and later GPUs.

    Compiled at the first call, for packs and for one document, about 6 s each.

    Args:
        deterministic: sum gradients in a fixed order, which is slower. None: as Transformer Engine
            is told, by NVTE_ALLOW_NONDETERMINISTIC_ALGO=0.
    """

    def __init__(self, *, deterministic: bool | None = None) -> None:
        if deterministic is None:
            deterministic = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"
        self.deterministic = deterministic

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: SequenceBounds
    ) -> tuple[Tensor, Tensor]:
        """Implement `AttentionKernel.forward`."""
        if _is_one_document(bounds):
            out, lse, *_ = _flash_attn_fwd(
                query[None], key[None], value[None], causal=True, return_lse=True
            )
            return out[0], lse[0]
        out, lse, *_ = _flash_attn_fwd(
            query, key, value, causal=True, return_lse=True, **_arguments(bounds)
        )
        return out, lse

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
        """Implement `AttentionKernel.backward`."""
        tensors = (query, key, value, out, grad, lse)
        if _is_one_document(bounds):
            grads = _flash_attn_bwd(
                *(x[None] for x in tensors), causal=True, deterministic=self.deterministic
            )
            return grads[0][0], grads[1][0], grads[2][0]
        grads = _flash_attn_bwd(
            *tensors, causal=True, deterministic=self.deterministic, **_arguments(bounds)
        )
        return grads[0], grads[1], grads[2]


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend over part of the keys, forward alone.

    Args:
        query: [m, heads, d].
        key: [groups, n, d], of any strides but the last, 1.
        value: like key.
        causal: query i sees keys up to i; then n = m.

    Returns:
        Output [m, heads, d] and log-sum-exp [heads, m] in fp32.
    """
    # Heads of a group packed into one block of queries are 3 to 7 % slower over long keys.
    out, lse, *_ = _flash_attn_fwd(
        query[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        causal=causal,
        return_lse=True,
        pack_gqa=False,
    )
    return out[0], lse[0]


def _is_one_document(bounds: SequenceBounds) -> bool:
    """Tell whether the kernels for equal lengths apply, 3 % faster at 128K than those for packs."""
    return len(bounds.query) == 2 and bounds.longest_query == bounds.longest_key


def _arguments(bounds: SequenceBounds) -> dict[str, Any]:
    return {
        "cu_seqlens_q": bounds.query,
        "cu_seqlens_k": bounds.key,
        "max_seqlen_q": bounds.longest_query,
        "max_seqlen_k": bounds.longest_key,
    }


def check_fa4(*, heads: int, query_groups: int, width: int, dtype: torch.dtype) -> None:
    """Compare the kernels with torch's attention in fp32, forward and backward, on two small
    inputs.

    The inputs are a whole document with the end of another, and one document. The kernels compiled
    here are those used in training.

    Raises:
        PlatformError: the kernels cannot run, or their results differ.
    """
    for queries, keys in (([208, 128], [208, 336]), ([336], [336])):
        query, grad = _random(2, sum(queries), heads, width, dtype=dtype)
        key, value = _random(2, sum(keys), query_groups, width, dtype=dtype)
        bounds = SequenceBounds(_starts(queries), _starts(keys), max(queries), max(keys))
        try:
            found = _attend(query, key, value, grad, bounds)
        except Exception as error:
            raise PlatformError(
                f"FlashAttention-4 does not run here ({type(error).__name__}: {error}): use "
                "parallel.attention_backend te, or install what requirements-gpu.txt names"
            ) from error
        exact = _in_fp32(query, key, value, grad, lengths=(queries, keys))
        names = ("output", "query gradient", "key gradient", "value gradient")
        if difference := _first_difference(found, exact, names=names):
            raise PlatformError(f"{difference}; use parallel.attention_backend te")


def check_forward(*, heads: int, query_groups: int, width: int, dtype: torch.dtype) -> None:
    """Compare `attend_part` with torch's attention in fp32, with and without a causal mask.

    Raises:
        PlatformError: the kernels cannot run, or their results differ.
    """
    (query,) = _random(1, 336, heads, width, dtype=dtype)
    key, value = (x.transpose(0, 1) for x in _random(2, 336, query_groups, width, dtype=dtype))
    for causal in (False, True):
        try:
            out, lse = attend_part(query, key, value, causal=causal)
            torch.cuda.synchronize()
        except Exception as error:
            raise PlatformError(
                f"FlashAttention-4 does not run here ({type(error).__name__}: {error})"
            ) from error
        exact = _part_in_fp32(query, key, value, causal=causal)
        names = ("output", "log-sum-exp")
        if difference := _first_difference((out, lse), list(exact), names=names):
            raise PlatformError(difference)


def _part_in_fp32(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute what `attend_part` does from all scores."""
    members = query.shape[1] // len(key)
    key, value = (x.float().repeat_interleave(members, 0) for x in (key, value))
    scores = torch.einsum("mhd,hnd->hmn", query.float(), key) / query.shape[-1] ** 0.5
    if causal:
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("hmn,hnd->mhd", scores.softmax(-1), value), scores.logsumexp(-1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, bounds: SequenceBounds
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of query, key and value."""
    kernel = FlashAttention4()
    out, lse = kernel.forward(query, key, value, bounds)
    grads = kernel.backward(
        grad, query=query, key=key, value=value, out=out, lse=lse, bounds=bounds
    )
    # Kernels run later than their calls: their errors must be raised here.
    torch.cuda.synchronize()
    return out, *grads


def _first_difference(
    found: tuple[Tensor, ...], expected: list[Tensor], *, names: tuple[str, ...]
) -> str:
    """Describe the first tensor that differs by more than LARGEST_ERROR; empty: none does."""
    for name, ours, exact in zip(names, found, expected, strict=True):
        error = ((ours.float() - exact).norm() / exact.norm()).item()
        # Not `error >= ...`, which NaN would pass.
        if not error < LARGEST_ERROR:
            return (
                f"FlashAttention-4 computes wrongly here: its {name} differs from torch's attention by {error:.2%}, of "
                f"which {LARGEST_ERROR:.0%} are allowed"
            )
    return ""


def _in_fp32(*tensors: Tensor, lengths: tuple[list[int], list[int]]) -> list[Tensor]:
    """Return the output and the gradients of query, key and value by torch, sequence by
    sequence."""
    parts: list[list[Tensor]] = [[], [], [], []]
    sizes = (lengths[0], lengths[1], lengths[1], lengths[0])
    split = [x.float().split(size) for x, size in zip(tensors, sizes, strict=True)]
    for query, key, value, grad in zip(*split, strict=True):
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        q, k, v = (x.transpose(0, 1) for x in inputs)
        # Aligned at the ends: the last query sees all keys, of which earlier ones may have no query.
        mask = torch.ones(len(query), len(key), dtype=torch.bool, device=q.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.tril(len(key) - len(query)), enable_gqa=True
        ).transpose(0, 1)
        results = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        for part, result in zip(parts, results, strict=True):
            part.append(result)
    return [torch.cat(part) for part in parts]


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(platform.device()).manual_seed(0)
    return torch.randn(*shape, device=platform.device(), dtype=dtype, generator=generator)


def _starts(lengths: list[int]) -> Tensor:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return to_device(starts, platform.device())
