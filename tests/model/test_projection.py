"""The backward pass of a projection without its output, and gradients that pieces add to
`main_grad` themselves, as Transformer Engine's layers do."""

import pytest
import torch
from torch import Tensor, nn

from megatron_vita.model.pieces import PieceGradients, checkpoint_pieces, split_evenly
from megatron_vita.model.projection import without_output


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(6, 4, bias=False, dtype=dtype)
    nn.init.normal_(linear.weight, generator=generator)
    rows = torch.randn(10, 1, 6, generator=generator).to(dtype).requires_grad_()
    return linear, rows, torch.randn(10, 1, 4, generator=generator).to(dtype)


def test_gradients_are_those_of_the_projection() -> None:
    linear, rows, grad = make()
    expected = torch.autograd.grad(linear(rows), [rows, linear.weight], grad)
    result = without_output(rows, linear, group=None)
    assert result.shape == grad.shape
    assert result.untyped_storage().nbytes() == 4
    found = torch.autograd.grad(result, [rows, linear.weight], grad)
    torch.testing.assert_close(found, expected)


def test_a_frozen_projection_has_a_gradient_of_its_input_alone() -> None:
    linear, rows, grad = make()
    linear.requires_grad_(False)
    (found,) = torch.autograd.grad(without_output(rows, linear, group=None), [rows], grad)
    torch.testing.assert_close(found, grad @ linear.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_main_grad", [False, True])
def test_pieces_give_a_weight_one_gradient(dtype: torch.dtype, in_main_grad: bool) -> None:
    linear, rows, grad = make(dtype)
    exact = torch.mm(grad[:, 0].t().double(), rows[:, 0].double())
    arrived = []
    assert isinstance(linear.weight, torch.nn.Parameter)
    node = linear.weight.expand_as(linear.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: arrived.append(linear.weight))  # as megatron-core does
    if in_main_grad:
        vars(linear)["fuse_wgrad_accumulation"] = True
        vars(linear.weight)["main_grad"] = torch.ones(4, 6)
        vars(linear.weight)["grad_added_to_main_grad"] = False
    gradients = PieceGradients([linear.weight])
    for part, arriving in zip(rows.detach().split(3), grad.split(3), strict=True):
        piece = part.requires_grad_()
        gradients.backward(without_output(piece, linear, group=None), arriving, piece)
    gradients.deliver()
    assert len(arrived) == 1
    assert linear.weight.grad.dtype == dtype
    found = vars(linear.weight)["main_grad"] - 1 if in_main_grad else linear.weight.grad
    # rounded once: sums are in fp32
    tolerance = 1e-2 if dtype == torch.bfloat16 and not in_main_grad else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    if in_main_grad:
        assert vars(linear.weight)["grad_added_to_main_grad"]
        assert not linear.weight.grad.any()


def test_sums_over_many_pieces_are_not_rounded_piece_by_piece() -> None:
    """256 pieces of 1 after one of 256: in bf16, 256 + 1 is 256."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    gradients = PieceGradients([weight])
    for value in [256.0] + [1.0] * 256:
        rows = torch.full((1, 1), value, dtype=torch.bfloat16)
        gradients.backward(rows @ weight, torch.ones(1, 1, dtype=torch.bfloat16))
    gradients.deliver()
    assert weight.grad.item() == 512


@pytest.mark.parametrize(
    ("rows", "at_most", "sizes"),
    [
        (7, 2, [2, 2, 2, 1]),
        (9, 8, [5, 4]),
        (8, 8, [8]),
        (3, 100, [3]),
        (0, 4, [0]),
        (65, 64, [33, 32]),
    ],
)
def test_pieces_are_few_and_of_nearly_equal_size(rows: int, at_most: int, sizes: list[int]) -> None:
    assert [len(piece) for piece in split_evenly(torch.zeros(rows, 2), at_most=at_most)] == sizes


@pytest.mark.parametrize("count", [0, 1, 7])
def test_checkpointed_pieces_give_the_gradients_of_the_whole(count: int) -> None:
    linear, _, _ = make()
    rows = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    run = nn.Sequential(linear, nn.GELU(), nn.Linear(4, 5))
    expected = torch.autograd.grad(run(rows).square().sum(), list(run.parameters()))
    result = checkpoint_pieces(run, rows, at_most=3, weights=list(run.parameters()))
    torch.testing.assert_close(result.detach(), run(rows).detach())
    found = torch.autograd.grad(result.square().sum(), list(run.parameters()))
    torch.testing.assert_close(found, expected)
