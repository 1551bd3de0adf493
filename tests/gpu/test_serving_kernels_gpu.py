"""Kernels of serving against plain attention in fp32."""

import pytest
import torch
from torch import Tensor

from megatron_vita.inference.runner.kv_cache import CacheShape, KeyValueCache
from megatron_vita.inference.runner.partial_attention import attend, merge_attention_states
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.layout.blocks import BlockLayout
from tests.gpu.fields import GPUS

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
