"""Attention over part of the keys: each result comes with the log-sum-exp of its scores, by which
parts are merged.

On CUDA, long parts go to FlashAttention-4 where it runs, else to cuDNN. cuDNN builds a plan for each
shape, so it is given only what is regular.
"""

import functools
import logging

import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import FA4_WIDTHS

logger = logging.getLogger(__name__)

PLANNED_ROWS = 1024
PLANNED_KEYS = 8192
"""cuDNN takes a multiple of PLANNED_ROWS queries over at least PLANNED_KEYS keys."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """query [m, heads, d]; key, value [groups, n, d], n > 0 -> out [m, heads, d], log-sum-exp [m,
    heads] in fp32.

    `causal`: query i sees keys up to i; then n = m.
    """
    if _is_for_fa4(query, key):
        from megatron_vita.model.backends.fa4 import attend_part

        out, lse = attend_part(query, key, value, causal=causal)
        return out, lse.T
    q = query.transpose(0, 1)[None]
    k = key[None]
    v = value[None]
    if not query.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif query.dtype == torch.float32:
        heads = q.shape[1] // k.shape[1]
        # This kernel knows no grouped query attention.
        k = k.repeat_interleave(heads, 1)
        v = v.repeat_interleave(heads, 1)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal
        )[:2]
    elif k.shape[2] >= PLANNED_KEYS and q.shape[2] % PLANNED_ROWS == 0:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False
        )[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[
            :2
        ]
    lse = lse.reshape(q.shape[1], -1)[:, : len(query)]  # some kernels pad rows or add a dimension
    return out[0].transpose(0, 1), lse.T


def _is_for_fa4(query: Tensor, key: Tensor) -> bool:
    """Tell whether FlashAttention-4 attends from query [m, heads, d] to key [groups, n, d]."""
    # Few queries over many keys are left to kernels that divide the keys over the device.
    if not query.is_cuda or key.shape[1] < PLANNED_KEYS or len(query) < PLANNED_ROWS:
        return False
    return has_fa4(
        heads=query.shape[1], query_groups=len(key), width=query.shape[2], dtype=query.dtype
    )


@functools.cache
def has_fa4(*, heads: int, query_groups: int, width: int, dtype: torch.dtype) -> bool:
    """Tell whether FlashAttention-4 runs here and computes this shape right.

    The first call of a shape compiles its kernels, some seconds, and warns if they cannot be
    imported or compute wrong.
    """
    if dtype != torch.bfloat16 or width not in FA4_WIDTHS:
        return False
    if torch.cuda.get_device_capability() < (9, 0):
        return False
    try:
        if not platform.has_flash_attention_4():
            return False
        from megatron_vita.model.backends.fa4 import check_forward

        check_forward(heads=heads, query_groups=query_groups, width=width, dtype=dtype)
    # A package that is installed by halves fails at its import, in whatever way.
    except Exception as error:
        logger.warning(
            "prompts are computed by cuDNN's attention: %s: %s", type(error).__name__, error
        )
        return False
    return True


def merge_attention_states(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge two attention states, each (out [m, heads, d], log-sum-exp [m, heads]), into one.

    A part without keys has a log-sum-exp of -inf.
    """
    (a, lse_a) = first
    (b, lse_b) = second
    if a.is_cuda:
        from megatron_vita.inference.runner.kernels import merge_states_on_cuda

        return merge_states_on_cuda(a, lse_a, b, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf minus -inf is NaN: neither part has keys, and both weights are 0.
    weight_a, weight_b = ((part - lse).exp().nan_to_num()[..., None] for part in (lse_a, lse_b))
    return (a * weight_a + b * weight_b).to(a.dtype), lse


def merge_all_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge P attention states: outs [P, m, heads, d], lses [P, m, heads]."""
    return functools.reduce(merge_attention_states, zip(outs, lses, strict=True))
