"""On a GPU: 8-bit linear layers follow bf16, under recomputation too."""

from functools import cache

import pytest
from torch import Tensor

from tests.gpu.fields import fa4_layouts
from tests.gpu.test_levers_gpu import FULL, KEPT, OFFLOADED, PIECES, SELECTIVE, three_steps

pytestmark = pytest.mark.skipif(
    not fa4_layouts(), reason="needs FlashAttention-4 and a GPU that is no older than Hopper"
)
RECIPES = ["tensorwise", "blockwise"]
# Measured: 0.35 of the norm. Products of three bits of mantissa add up over the layers.
LARGEST = 0.45


@cache
def plain(name: str = "none") -> tuple[list[float], Tensor]:
    """Losses and gradients without recomputation."""
    losses, gradients, _ = three_steps(fp8_recipe=name)
    return losses, gradients


def distance(found: Tensor, expected: Tensor) -> float:
    """Difference as a part of the expected gradients' norm."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", RECIPES)
def test_eight_bits_follow_the_losses_and_gradients_of_bf16(name: str) -> None:
    losses, gradients = plain()
    found, coarse = plain(name)
    assert found == pytest.approx(losses, rel=0.02)
    # Less would mean that nothing was computed in 8 bits.
    assert 0.005 < distance(coarse, gradients) < LARGEST


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tensorwise", FULL),
        ("blockwise", FULL),
        ("blockwise", KEPT | PIECES | OFFLOADED),
        ("blockwise", SELECTIVE | PIECES),
    ],
)
def test_recomputation_rounds_as_the_first_pass_did(name: str, fields: dict) -> None:
    losses, gradients = plain(name)
    found, recomputed, _ = three_steps(fp8_recipe=name, **fields)
    assert found == pytest.approx(losses, rel=5e-3)
    assert distance(recomputed, gradients) < 0.1


@pytest.mark.parametrize("fields", [KEPT | PIECES | OFFLOADED, SELECTIVE | PIECES])
def test_pieces_with_scales_of_their_own_stay_as_close_to_bf16(fields: dict) -> None:
    losses, gradients = plain()
    found, recomputed, _ = three_steps(fp8_recipe="tensorwise", **fields)
    assert found == pytest.approx(losses, rel=0.02)
    assert distance(recomputed, gradients) < LARGEST
