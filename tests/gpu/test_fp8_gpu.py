"""On a GPU: 8-bit linear layers follow the losses of bf16, under recomputation too."""

import pytest

from tests.gpu.fields import GPUS
from tests.gpu.test_levers_gpu import FULL, KEPT, OFFLOADED, PIECES, SELECTIVE, three_steps

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
RECIPES = ["tensorwise", "blockwise"]


@pytest.mark.parametrize("name", RECIPES)
def test_eight_bits_follow_the_losses_and_gradients_of_bf16(name: str) -> None:
    losses, gradients, _ = three_steps()
    found, coarse, _ = three_steps(fp8_recipe=name)
    assert found == pytest.approx(losses, rel=0.02)
    # Rounding to 3 bits of mantissa changes gradients by percents: less means that nothing was 8-bit.
    difference = (coarse - gradients).norm() / gradients.norm()
    assert 0.005 < difference < 0.3


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("fields", [FULL, KEPT | PIECES | OFFLOADED, SELECTIVE | PIECES])
def test_recomputation_of_eight_bit_layers_changes_losses_within_rounding(
    name: str, fields: dict
) -> None:
    losses, gradients, _ = three_steps(fp8_recipe=name)
    found, recomputed, _ = three_steps(fp8_recipe=name, **fields)
    assert found == pytest.approx(losses, rel=5e-3)
    assert (recomputed - gradients).norm() < 0.1 * gradients.norm()
