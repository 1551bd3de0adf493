"""Triton kernels of serving: rotary positions, paged decode attention, merging of attention states."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 528
"""Maximum number of parts that keys are split into: enough programs to fill 132 multiprocessors a few times over."""


def merge_states_on_cuda(
    a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """See `partial_attention.join`: a, b [m, heads, d] of any strides but the last, 1."""
    rows, heads, width = a.shape
    out = torch.empty(rows, heads, width, dtype=a.dtype, device=a.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=a.device)
    block = triton.next_power_of_2(width)
    _join[(rows, heads)](
        a, lse_a, b, lse_b, out, lse,
        *a.stride()[:2], *lse_a.stride(), *b.stride()[:2], *lse_b.stride(), heads,
        WIDTH=width, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return out, lse


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    a, lse_a, b, lse_b, out, lse,
    a_row, a_head, la_row, la_head, b_row, b_head, lb_row, lb_head, heads,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(lse_a + row * la_row + head * la_head)
    second = tl.load(lse_b + row * lb_row + head * lb_head)
    # A finite lower bound: with -inf on both sides the differences below would be NaN.
    peak = tl.maximum(tl.maximum(first, second), -1e30)
    weight_a = tl.exp(first - peak)
    weight_b = tl.exp(second - peak)
    total = weight_a + weight_b
    scale = 1.0 / tl.maximum(total, 1e-30)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(a + row * a_row + head * a_head + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + row * b_row + head * b_head + column, mask=inside, other=0.0).to(tl.float32)
    joined = (x * weight_a + y * weight_b) * scale
    tl.store(
        out + (row * heads + head) * WIDTH + column, joined.to(out.dtype.element_ty), mask=inside
    )
    tl.store(lse + row * heads + head, tl.where(total > 0, tl.log(total) + peak, -float("inf")))


def rotate_on_cuda(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rotary.Rotation.rotate`: rows [t, heads, d] of any strides but the last, 1."""
    count, heads, width = rows.shape
    out = torch.empty(count, heads, width, dtype=rows.dtype, device=rows.device)
    block = triton.next_power_of_2(width // 2)
    _rotate[(count, heads)](
        rows, cos, sin, out, *rows.stride()[:2], heads, HALF=width // 2, BLOCK=block, num_warps=1
    )
    return out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    rows, cos, sin, out, row_stride, head_stride, heads, HALF: tl.constexpr, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    _turn(rows + row * row_stride + head * head_stride, cos + row * HALF, sin + row * HALF,
          out + (row * heads + head) * 2 * HALF, HALF, BLOCK)  # fmt: skip


@triton.jit
def _turn(source, cos, sin, target, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    c = tl.load(cos + column, mask=inside)
    s = tl.load(sin + column, mask=inside)
    first = tl.load(source + column, mask=inside).to(tl.float32)
    second = tl.load(source + HALF + column, mask=inside).to(tl.float32)
    tl.store(target + column, (first * c - second * s).to(target.dtype.element_ty), mask=inside)
    tl.store(
        target + HALF + column, (second * c + first * s).to(target.dtype.element_ty), mask=inside
    )


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate query [B, heads, d], which is returned, and key [B, groups, d], in one launch.

    The key goes to `keys` [groups, slots, d] at `slots` [B], the value to `values`.
    """
    batch, heads, width = query.shape
    groups = key.shape[1]
    out = torch.empty(batch, heads, width, dtype=query.dtype, device=query.device)
    block = triton.next_power_of_2(width // 2)
    _rotate_and_store[(batch, heads + groups)](
        query, key, value, cos, sin, keys, values, slots, out,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], keys.stride(0), heads,
        HALF=width // 2, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_and_store(  # type: ignore[no-untyped-def]
    query, key, value, cos, sin, keys, values, slots, out,
    q_row, q_head, k_row, k_head, v_row, v_head, group_stride, heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += row * HALF
    sin += row * HALF
    if head < heads:
        _turn(
            query + row * q_row + head * q_head,
            cos,
            sin,
            out + (row * heads + head) * 2 * HALF,
            HALF,
            BLOCK,
        )
    else:
        group = (head - heads).to(tl.int64)
        place = group * group_stride + tl.load(slots + row) * 2 * HALF
        _turn(key + row * k_row + group * k_head, cos, sin, keys + place, HALF, BLOCK)
        column = tl.arange(0, 2 * BLOCK)
        inside = column < 2 * HALF
        x = tl.load(value + row * v_row + group * v_head + column, mask=inside)
        tl.store(values + place + column, x, mask=inside)


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    tables: Tensor,
    lengths: Tensor,
    page_tokens: int,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token of each of B sequences over the pages that are held here; safe in CUDA
    graphs.

    query [B, heads, d]; keys, values [groups, slots, d]; tables [B, pages] int32, page numbers of
    each sequence; lengths [B] int32, tokens held here. `scales` [groups, slots] fp32 each where
    keys and values are of 8 bits. Returns out [B, heads, d] and log-sum-exp [B, heads], both fp32;
    -inf where there are no keys.
    """
    batch, heads, width = query.shape
    groups = len(keys)
    members = heads // groups
    # Few sequences alone would not fill the GPU, so their pages are split over programs.
    splits = max(1, min(128, _PROGRAMS // (batch * groups)))
    parts = torch.empty(splits, batch, heads, width, dtype=torch.float32, device=query.device)
    sums = torch.empty(splits, batch, heads, dtype=torch.float32, device=query.device)
    # Any tensor will do as an argument that is not read.
    key_scales, value_scales = scales or (query, query)
    _attend_pages[(splits, groups, batch)](
        query, keys, values, key_scales, value_scales, tables, lengths, parts, sums,
        keys.stride(0), 0 if scales is None else key_scales.stride(0), tables.stride(0), width**-0.5,
        batch, heads, MEMBERS=members, MEMBER_BLOCK=max(16, triton.next_power_of_2(members)),
        WIDTH=width, WIDTH_BLOCK=max(16, triton.next_power_of_2(width)), PAGE=page_tokens,
        PAGE_BLOCK=max(16, page_tokens), SCALED=scales is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty(batch, heads, width, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=query.device)
    _join_splits[(batch, heads)](
        parts, sums, out, lse, batch, heads, splits,
        SPLITS=triton.next_power_of_2(splits), WIDTH=width, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out, lse


@triton.jit
def _attend_pages(  # type: ignore[no-untyped-def]
    query, keys, values, key_scales, value_scales, tables, lengths, parts, sums,
    group_stride, scale_stride, table_stride, scale, batch, heads,
    MEMBERS: tl.constexpr, MEMBER_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr,  # noqa: N803
    PAGE: tl.constexpr, PAGE_BLOCK: tl.constexpr, SCALED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Attend to one split of a sequence's pages, for all query heads of a key group."""
    split = tl.program_id(0)
    group = tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths + sequence)
    pages = tl.cdiv(length, PAGE)
    share = tl.cdiv(pages, tl.num_programs(0))
    first = split * share
    last = tl.minimum((split + 1) * share, pages)
    member = tl.arange(0, MEMBER_BLOCK)
    column = tl.arange(0, WIDTH_BLOCK)
    row = tl.arange(0, PAGE_BLOCK)
    head = group * MEMBERS + member
    real = (member < MEMBERS)[:, None] & (column < WIDTH)[None, :]
    q = tl.load(
        query + (sequence * heads + head)[:, None] * WIDTH + column[None, :], mask=real, other=0.0
    )
    keys += group.to(tl.int64) * group_stride
    values += group.to(tl.int64) * group_stride
    # Online softmax: the running maximum, sum and weighted values of the pages so far.
    peak = tl.full([MEMBER_BLOCK], -1e30, tl.float32)
    total = tl.zeros([MEMBER_BLOCK], tl.float32)
    gathered = tl.zeros([MEMBER_BLOCK, WIDTH_BLOCK], tl.float32)
    for page in range(first, last):
        slot = tl.load(tables + sequence * table_stride + page).to(tl.int64) * PAGE + row
        seen = (row < PAGE) & (page * PAGE + row < length)
        mask = seen[:, None] & (column < WIDTH)[None, :]
        place = slot[:, None] * WIDTH + column[None, :]
        k = tl.load(keys + place, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SCALED:
            factor = tl.load(key_scales + group * scale_stride + slot, mask=seen, other=0.0)
            scores *= factor[None, :]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        if SCALED:
            factor = tl.load(value_scales + group * scale_stride + slot, mask=seen, other=0.0)
            weights *= factor[None, :]
        v = tl.load(values + place, mask=mask, other=0.0).to(q.dtype)
        gathered = gathered * shrink[:, None] + tl.dot(
            weights.to(q.dtype), v, input_precision="ieee"
        )
        peak = higher
    place = (split * batch + sequence) * heads + head
    result = gathered / tl.maximum(total, 1e-30)[:, None]
    tl.store(parts + place[:, None] * WIDTH + column[None, :], result, mask=real)
    tl.store(
        sums + place,
        tl.where(total > 0, tl.log(total) + peak, -float("inf")),
        mask=member < MEMBERS,
    )


@triton.jit
def _join_splits(  # type: ignore[no-untyped-def]
    parts, sums, out, lse, batch, heads, splits,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, BLOCK)
    place = (split * batch + sequence) * heads + head
    inside = split < splits
    values = tl.load(sums + place, mask=inside, other=-float("inf"))
    peak = tl.maximum(tl.max(values, 0), -1e30)
    weights = tl.exp(values - peak)
    total = tl.sum(weights, 0)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    rows = tl.load(parts + place[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    joined = tl.sum(rows * weights[:, None], 0) / tl.maximum(total, 1e-30)
    tl.store(out + (sequence * heads + head) * WIDTH + column, joined, mask=column < WIDTH)
    tl.store(
        lse + sequence * heads + head, tl.where(total > 0, tl.log(total) + peak, -float("inf"))
    )
