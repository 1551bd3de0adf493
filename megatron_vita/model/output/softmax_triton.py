"""Triton kernels of `softmax`: one read of the logits for the summary, one more to overwrite
them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


def summarize_on_cuda(logits: Tensor, *, targets: Tensor, columns: int) -> Tensor:
    """Return [4, r]: largest logit, sum of exponentials relative to it, target's logit or 0,
    sum."""
    rows = len(logits)
    parts = torch.empty(4, rows, device=logits.device, dtype=torch.float32)
    _summarize[(rows,)](
        logits, targets, parts, rows, columns, logits.stride(0), BLOCK=_BLOCK, num_warps=_WARPS
    )
    return parts


def write_gradient_on_cuda(
    logits: Tensor, *, targets: Tensor, columns: int, factors: Tensor
) -> None:
    """Overwrite logits [r, v]; `factors` [4, r] are log-sum, slope, aim and floor."""
    rows, width = logits.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    _write_gradient[grid](
        logits,
        targets,
        factors,
        rows,
        columns,
        width,
        logits.stride(0),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


@triton.jit
def _summarize(logits, targets, parts, rows, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    # Each lane keeps a running maximum and sum of its own columns, so that lanes need not exchange
    # values in the loop: they are reduced once, at the end.
    largest = tl.full([BLOCK], -1e30, tl.float32)
    exponentials = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
        peak = tl.maximum(largest, x)
        exponentials = exponentials * tl.exp(largest - peak) + tl.exp(x - peak)
        largest = peak
        total += tl.where(inside, x, 0.0)
    peak = tl.max(largest, 0)
    target = tl.load(targets + row)
    here = (target >= 0) & (target < columns)
    tl.store(parts + row, peak)
    tl.store(parts + rows + row, tl.sum(exponentials * tl.exp(largest - peak), 0))
    tl.store(parts + 2 * rows + row, tl.load(logits + target, mask=here, other=0.0).to(tl.float32))
    tl.store(parts + 3 * rows + row, tl.sum(total, 0))


@triton.jit
def _write_gradient(logits, targets, factors, rows, columns, width, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride + column
    x = tl.load(logits, mask=column < columns, other=-float("inf")).to(tl.float32)
    log_sum = tl.load(factors + row)
    slope = tl.load(factors + rows + row)
    aim = tl.load(factors + 2 * rows + row)
    floor = tl.load(factors + 3 * rows + row)
    gradient = (
        tl.exp(x - log_sum) * slope - floor - tl.where(column == tl.load(targets + row), aim, 0.0)
    )
    tl.store(
        logits,
        tl.where(column < columns, gradient, 0.0).to(logits.dtype.element_ty),
        mask=column < width,
    )
