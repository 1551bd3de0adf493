"""Kernels of serving against plain attention in fp32."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from megatron_vita.inference.runner.kv_cache import CacheShape, KeyValueCache
from megatron_vita.inference.runner.partial_attention import (
    attend,
    has_fa4,
    merge_attention_states,
)
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.layout.blocks import BlockLayout
from tests.gpu.fields import GPUS, fa4_layouts

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")

HEADS = 14
GROUPS = 2
WIDTH = 128
PAGE = 64
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def plain(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """query [m, heads, d]; key, value [groups, n, d], by all scores in fp32."""
    members = query.shape[1] // len(key)
    key, value = (x.float().repeat_interleave(members, 0) for x in (key, value))
    scores = torch.einsum("mhd,hnd->hmn", query.float(), key) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
    return torch.einsum("hmn,hnd->mhd", scores.softmax(-1), value), scores.logsumexp(-1).T


@DTYPES
@pytest.mark.parametrize(
    ("rows", "keys", "causal"),
    [(100, 300, False), (300, 300, True), (1024, 8192, False), (8192, 8192, True)],
)
def test_partial_attention_is_plain_attention(
    dtype: torch.dtype, rows: int, keys: int, causal: bool
) -> None:
    query, key, value = (
        noise(rows, 2, 64, dtype=dtype),
        *(noise(1, keys, 64, dtype=dtype) for _ in range(2)),
    )
    for actual, expected in zip(
        attend(query, key, value, causal=causal),
        plain(query, key, value, causal=causal),
        strict=True,
    ):
        torch.testing.assert_close(
            actual.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("shape", [(14, 2), (28, 4), (2, 1)], ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "causal"), [(1030, 20000, False), (8192, 8192, True), (8500, 8500, True)]
)
def test_long_parts_by_flash_attention_4_are_plain_attention(
    rows: int, keys: int, causal: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fa4_layouts():
        pytest.skip("needs FlashAttention-4 and a Hopper GPU or a later one")
    from megatron_vita.model.backends import fa4

    kernel = Mock(wraps=fa4.attend_part)
    monkeypatch.setattr(fa4, "attend_part", kernel)
    heads, groups = shape
    dtype = torch.bfloat16
    assert has_fa4(heads=heads, query_groups=groups, width=WIDTH, dtype=dtype)
    query = noise(rows, heads, WIDTH, dtype=dtype)
    key, value = (noise(groups, keys + 5, WIDTH, dtype=dtype)[:, 5:] for _ in range(2))
    out, lse = attend(query, key, value, causal=causal)
    kernel.assert_called_once()
    some = torch.arange(0, rows, 7, device="cuda")
    # all scores of some rows: those of 28 heads over 20,000 keys would not fit
    for head in range(0, heads, heads // groups):
        group = head * groups // heads
        part = (key[group, None], value[group, None])
        expected, sums = plain_rows(query[:, head, None], *part, rows=some, causal=causal)
        error = (out[some, head, None].float() - expected).norm() / expected.norm()
        assert error < 0.01
        torch.testing.assert_close(lse[some, head, None], sums, atol=2e-3, rtol=1e-4)


def plain_rows(
    query: Tensor, key: Tensor, value: Tensor, *, rows: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute some rows of `plain`, of one head."""
    scores = torch.einsum("mhd,hnd->hmn", query[rows].float(), key.float()) / WIDTH**0.5
    if causal:
        later = torch.arange(key.shape[1], device="cuda") > rows[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    out = torch.einsum("hmn,hnd->mhd", scores.softmax(-1), value.float())
    return out, scores.logsumexp(-1).T


@DTYPES
def test_joined_parts_are_the_whole(dtype: torch.dtype) -> None:
    query = noise(100, HEADS, WIDTH, dtype=dtype)
    key, value = (noise(GROUPS, 300, WIDTH, dtype=dtype) for _ in range(2))
    parts = [attend(query, key[:, part], value[:, part]) for part in (slice(0, 90), slice(90, 300))]
    nothing = (torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf, device="cuda"))
    out, lse = merge_attention_states(merge_attention_states(*parts), nothing)
    expected, sums = plain(query, key, value)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse, sums, atol=1e-5, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("page", [PAGE, 4])
def test_new_tokens_see_the_pages_of_their_own_sequence(
    dtype: torch.dtype, fp8: bool, page: int
) -> None:
    shape = CacheShape(layers=1, groups=GROUPS, width=WIDTH, dtype=dtype, fp8=fp8)
    pages = PAGE // page
    cache = KeyValueCache(
        BlockLayout(page_tokens=page), shape, blocks=128 * pages, device=torch.device("cuda")
    )
    tables = torch.randperm(127 * pages)[: 120 * pages].view(3, 40 * pages) + 1
    lengths = [2500, 0, 701]
    query = noise(3, HEADS, WIDTH, dtype=dtype)
    expected = []
    for row, length in enumerate(lengths):
        key, value = (noise(length, GROUPS, WIDTH, dtype=dtype) for _ in range(2))
        at = torch.arange(length)
        cache.write(1, key, value, slots=(tables[row][at // page] * page + at % page).cuda())
        expected.append(
            plain(query[row : row + 1], key.transpose(0, 1), value.transpose(0, 1))
            if length
            else None
        )
    out, lse = cache.attend_decode(
        1,
        query,
        tables=tables.int().cuda(),
        lengths=torch.tensor(lengths, device="cuda", dtype=torch.int32),
    )
    assert out[1].abs().max() == 0
    assert (lse[1] == -torch.inf).all()
    tolerance = 3e-2 if fp8 else TOLERANCE[dtype]
    for row in (0, 2):
        torch.testing.assert_close(out[row : row + 1], expected[row][0], atol=tolerance, rtol=0)
        torch.testing.assert_close(lse[row : row + 1], expected[row][1], atol=tolerance, rtol=0)


@DTYPES
def test_rotated_rows_are_those_of_plain_torch_also_where_they_are_stored(
    dtype: torch.dtype,
) -> None:
    rotation = Rotation(
        cos=torch.randn(5, WIDTH // 2, device="cuda"), sin=torch.randn(5, WIDTH // 2, device="cuda")
    )
    on_host = Rotation(cos=rotation.cos.cpu(), sin=rotation.sin.cpu())
    query, key, value = noise(5, HEADS + 2 * GROUPS, WIDTH, dtype=dtype).split(
        [HEADS, GROUPS, GROUPS], dim=1
    )
    shape = CacheShape(layers=1, groups=GROUPS, width=WIDTH, dtype=dtype)
    cache = KeyValueCache(
        BlockLayout(page_tokens=PAGE), shape, blocks=4, device=torch.device("cuda")
    )
    slots = torch.tensor([70, 3, 129, 64, 65], device="cuda")
    rotated = cache.rotate_and_write(1, query, key, value, rotation=rotation, slots=slots)
    torch.testing.assert_close(
        rotated.cpu(),
        on_host.rotate(query.cpu()),
        atol=1e-6,
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
    )
    torch.testing.assert_close(rotation.rotate(query), rotated, atol=0, rtol=0)
    torch.testing.assert_close(
        cache._keys[0][:, slots], rotation.rotate(key).transpose(0, 1), atol=0, rtol=0
    )
    torch.testing.assert_close(cache._values[0][:, slots], value.transpose(0, 1), atol=0, rtol=0)
