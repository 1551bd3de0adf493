"""FlashAttention-4's kernels compute what torch computes in fp32, on whole packs and on chunks of them."""

from itertools import accumulate
from typing import Any

import pytest
import torch

from megatron_vita.errors import PlatformError
from megatron_vita.layout.zigzag import positions_of_rank, rank_chunks
from tests.gpu.fields import fa4_layouts

pytestmark = pytest.mark.skipif(
    not fa4_layouts(), reason="needs FlashAttention-4 and a Hopper GPU or a later one"
)
SHAPES = [(28, 4, 128), (14, 2, 128), (40, 8, 128), (8, 8, 64)]  # heads, groups, width
PACKS = [[304, 16, 656, 112, 800], [1920], [16] * 300]


def run(
    tensors: list[torch.Tensor], queries: list[int], keys: list[int], *, deterministic: bool = False
) -> list[torch.Tensor]:
    """Output and gradients of query, key, value [rows, heads, width] and output gradient."""
    from megatron_vita.model.backends.fa4 import FlashAttention4, _starts
    from megatron_vita.model.backends.flash_attention import SequenceBounds

    kernel = FlashAttention4(deterministic=deterministic)
    (query, key, value, grad) = tensors
    bounds = SequenceBounds(_starts(queries), _starts(keys), max(queries), max(keys))
    out, lse = kernel.forward(query, key, value, bounds)
    grads = kernel.backward(
        grad, query=query, key=key, value=value, out=out, lse=lse, bounds=bounds
    )
    return [out, *grads]


def random_tensors(rows: int, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Query, key, value and output gradient of a pack."""
    heads, groups, width = shape
    generator = torch.Generator("cuda").manual_seed(rows)
    return [
        torch.randn(rows, n, width, device="cuda", dtype=torch.bfloat16, generator=generator)
        for n in (heads, groups, groups, heads)
    ]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.float() - exact.float()).norm() < 0.008 * exact.float().norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", PACKS, ids=len)
def test_packs_have_the_outputs_and_gradients_of_torch_in_fp32(
    lengths: list[int], shape: tuple[int, int, int]
) -> None:
    from megatron_vita.model.backends.fa4 import _in_fp32

    tensors = random_tensors(sum(lengths), shape)
    assert_close(run(tensors, lengths, lengths), _in_fp32(*tensors, lengths=(lengths, lengths)))


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("lengths", PACKS[:2], ids=len)
def test_chunks_of_all_ranks_together_are_the_whole_pack(lengths: list[int], cp: int) -> None:
    tensors = random_tensors(sum(lengths), SHAPES[0])
    whole = run(tensors, lengths, lengths)
    bounds = torch.tensor([0, *accumulate(lengths)])
    order = torch.cat([positions_of_rank(bounds, cp_size=cp, cp_rank=r) for r in range(cp)])
    query, key, value, grad = tensors
    parts = [torch.zeros_like(x, dtype=torch.float32) for x in whole]
    for rank in range(cp):
        own = positions_of_rank(bounds, cp_size=cp, cp_rank=rank).cuda()
        chunks = rank_chunks(bounds, cp_size=cp, cp_rank=rank)
        seen = order[chunks.key_rows].cuda()
        found = run(
            [query[own], key[seen], value[seen], grad[own]],
            chunks.query_lengths.tolist(),
            chunks.key_lengths.tolist(),
        )
        for part, rows, piece in zip(parts, (own, own, seen, seen), found, strict=True):
            part.index_add_(0, rows, piece.float())
    assert_close(parts, whole)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_deterministic_gradients_are_the_same_bits_each_time(shape: tuple[int, int, int]) -> None:
    lengths = [304, 16, 1600, 128]
    tensors = random_tensors(sum(lengths), shape)
    first, *others = (run(tensors, lengths, lengths, deterministic=True) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_kernels_that_compute_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vita.model.backends import fa4

    shape: dict[str, Any] = {"heads": 14, "query_groups": 2, "width": 128, "dtype": torch.bfloat16}
    fa4.check_fa4(**shape)
    forward = fa4._flash_attn_fwd
    monkeypatch.setattr(
        fa4, "_flash_attn_fwd", lambda *args, **kwargs: forward(*args, **kwargs | {"causal": False})
    )
    with pytest.raises(PlatformError, match="computes wrongly here: its output differs"):
        fa4.check_fa4(**shape)
