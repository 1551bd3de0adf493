"""The output layer in one process: exact losses and gradients, and where and when they are
accumulated."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vita import platform
from megatron_vita.config import OutputConfig, Recipe
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.model.build import transformer_config
from megatron_vita.model.output.output import OutputLayer
from megatron_vita.parallel import groups

LENGTH = 40
VOCAB = 50
HIDDEN = 16
ROWS = {"some": [0, 3, 4, 17, 38], "one": [39], "none": [], "all": list(range(LENGTH))}


def make_layer(
    *, bf16: bool = False, chunk_rows: int = 3, vocab: int = VOCAB, **options: Any
) -> OutputLayer:
    platform.initialize_process()
    recipe = Recipe().replaced({"training.bf16": bf16})
    if not parallel_state.is_initialized() or groups.tensor_group().size() > 1:
        groups.initialize_groups(recipe.parallel)  # once: on CUDA each set of groups takes memory
    config = transformer_config(recipe, fused=False)
    config.hidden_size = HIDDEN
    config.init_method = torch.nn.init.normal_
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    layer = OutputLayer(config, vocab_size=vocab, options=OutputConfig(**options), owns_weight=True)
    layer.chunk_bytes = chunk_rows * vocab * layer.weight.element_size()
    return layer


@dataclass
class Problem:
    """A hidden state and what is asked of it."""

    hidden: Tensor  # [LENGTH, 1, HIDDEN]
    rows: Tensor
    labels: Tensor
    weights: Tensor  # of the losses

    def run(self, layer: OutputLayer) -> Tensor:
        """Losses, after a backward pass of their weighted sum."""
        losses = layer(self.hidden, rows=self.rows, labels=self.labels, row_scale=self.weights)
        (losses * self.weights).sum().backward()
        return losses.detach()

    def plain(
        self, layer: OutputLayer, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> tuple[Tensor, ...]:
        """Losses, gradient of the hidden state and of the weight: logits of all positions in plain
        PyTorch, in fp64: in fp32, label smoothing's sum over a large vocabulary alone is off by
        more than the tolerance on some processors."""
        hidden = self.hidden.detach().double().requires_grad_()
        labels = self.labels.to(self.hidden.device)
        weight = layer.weight.detach().double().requires_grad_()
        logits = (hidden.squeeze(1) @ weight.T)[self.rows]
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        losses = losses + z_loss * logits.logsumexp(-1).square()
        return losses.detach(), *torch.autograd.grad(
            (losses * self.weights).sum(), (hidden, weight)
        )


def make_problem(
    rows: str = "some", *, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(ROWS[rows], dtype=torch.int64)
    return Problem(
        hidden=torch.randn(LENGTH, 1, HIDDEN, generator=generator)
        .to(platform.device(), dtype)
        .requires_grad_(),
        rows=chosen,
        labels=torch.randint(0, VOCAB, (len(chosen),), generator=generator),
        weights=torch.rand(len(chosen), generator=generator).to(platform.device()) + 0.5,
    )


def zeros_for(layer: OutputLayer) -> Tensor:
    """Zeros in fp32, with the weight's shape."""
    return torch.zeros_like(layer.weight, dtype=torch.float32)


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected).norm() <= tolerance * expected.norm()


@pytest.fixture
def layer_with_main_grad() -> OutputLayer:
    """As megatron-core's data parallelism prepares it."""
    layer = make_layer(bf16=True)
    layer.weight.main_grad = zeros_for(layer)
    layer.weight.grad_added_to_main_grad = False
    return layer


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.02)]
)
@pytest.mark.parametrize("full_logits", [False, True])
def test_losses_and_gradients_equal_plain_cross_entropy(
    rows: str, label_smoothing: float, z_loss: float, full_logits: bool
) -> None:
    layer = make_layer(label_smoothing=label_smoothing, z_loss=z_loss, full_logits=full_logits)
    problem = make_problem(rows)
    losses, hidden_grad, weight_grad = problem.plain(
        layer, label_smoothing=label_smoothing, z_loss=z_loss
    )
    assert_close(problem.run(layer), losses)
    assert_close(problem.hidden.grad, hidden_grad)
    assert_close(layer.weight.grad, weight_grad)


@pytest.mark.parametrize("rows", ["some", "all"])
def test_bf16_is_exact_within_its_rounding(rows: str) -> None:
    layer = make_layer(bf16=True)
    problem = make_problem(rows, dtype=torch.bfloat16)
    losses, hidden_grad, weight_grad = problem.plain(layer)
    assert_close(problem.run(layer), losses, tolerance=1e-2)
    assert_close(problem.hidden.grad, hidden_grad, tolerance=1e-2)
    assert_close(layer.weight.grad, weight_grad, tolerance=1e-2)
    assert problem.hidden.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("vocab", [4095, 4096, 10_001])
def test_any_vocabulary_size_is_exact(vocab: int) -> None:
    layer = make_layer(vocab=vocab, label_smoothing=0.1)
    problem = make_problem("all")
    problem.labels = (problem.labels + vocab * torch.arange(LENGTH) // LENGTH) % vocab
    losses, hidden_grad, weight_grad = problem.plain(layer, label_smoothing=0.1)
    assert_close(problem.run(layer), losses)
    assert_close(problem.hidden.grad, hidden_grad)
    assert_close(layer.weight.grad, weight_grad)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_chunk_size_changes_nothing(chunk_rows: int) -> None:
    layer = make_layer(chunk_rows=chunk_rows)
    problem = make_problem("all")
    losses, hidden_grad, weight_grad = problem.plain(layer)
    assert_close(problem.run(layer), losses)
    assert_close(problem.hidden.grad, hidden_grad)
    assert_close(layer.weight.grad, weight_grad)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(frozen: str) -> None:
    layer = make_layer()
    problem = make_problem()
    _, hidden_grad, weight_grad = problem.plain(layer)
    {"weight": layer.weight, "hidden": problem.hidden}[frozen].requires_grad_(False)
    if frozen == "weight":
        layer.weight.main_grad = zeros_for(layer)
    problem.run(layer)
    if frozen == "weight":
        assert layer.weight.grad is None
        assert not layer.weight.main_grad.any()
        assert_close(problem.hidden.grad, hidden_grad)
    else:
        assert problem.hidden.grad is None
        assert_close(layer.weight.grad, weight_grad)


def test_inputs_are_left_as_they_are() -> None:
    layer = make_layer()
    for rows in ("some", "all"):
        problem = make_problem(rows)
        before = problem.hidden.detach().clone()
        problem.run(layer)
        assert torch.equal(problem.hidden, before)


def test_weight_gradients_of_microbatches_add_up_in_fp32_main_grad(
    layer_with_main_grad: OutputLayer,
) -> None:
    weight = layer_with_main_grad.weight
    expected = zeros_for(layer_with_main_grad)
    for seed, rows in enumerate(["some", "none", "all"]):
        problem = make_problem(rows, seed=seed, dtype=torch.bfloat16)
        expected += problem.plain(layer_with_main_grad)[2]
        problem.run(layer_with_main_grad)
        assert weight.grad_added_to_main_grad
        # what overlapped reduction wants to see
        assert weight.grad is None or not weight.grad.any()
        weight.grad = None
    assert weight.main_grad.dtype == torch.float32
    assert_close(weight.main_grad, expected, tolerance=1e-2)


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_evaluation_accumulates_nothing(layer_with_main_grad: OutputLayer, how: str) -> None:
    problem = make_problem(dtype=torch.bfloat16)
    layer_with_main_grad.train(how != "eval")
    with torch.set_grad_enabled(how == "eval"):
        losses = layer_with_main_grad(problem.hidden, rows=problem.rows, labels=problem.labels)
    assert_close(losses, problem.plain(layer_with_main_grad)[0], tolerance=1e-2)
    assert not layer_with_main_grad.weight.main_grad.any()
    if how == "eval":  # its backward may still come
        losses.sum().backward()
        problem.weights = torch.ones_like(problem.weights)
        assert_close(
            layer_with_main_grad.weight.main_grad,
            problem.plain(layer_with_main_grad)[2],
            tolerance=1e-2,
        )


def test_second_forward_accumulates_nothing_before_its_own_backward(
    layer_with_main_grad: OutputLayer,
) -> None:
    one = make_problem("some", seed=1, dtype=torch.bfloat16)
    two = make_problem("all", seed=2, dtype=torch.bfloat16)
    losses = [
        layer_with_main_grad(p.hidden, rows=p.rows, labels=p.labels, row_scale=p.weights)
        for p in (one, two)
    ]
    expected = one.plain(layer_with_main_grad)[2]
    assert_close(layer_with_main_grad.weight.main_grad, expected, tolerance=1e-2)
    (losses[1] * two.weights).sum().backward()
    (losses[0] * one.weights).sum().backward()
    expected = expected + two.plain(layer_with_main_grad)[2]
    assert_close(layer_with_main_grad.weight.main_grad, expected, tolerance=1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_recomputation_accumulates_once(
    layer_with_main_grad: OutputLayer, use_reentrant: bool
) -> None:
    problem = make_problem(dtype=torch.bfloat16)

    def run(hidden: Tensor) -> Tensor:
        hidden = hidden.sin().asin()  # saves something, so that recomputation does run
        losses = layer_with_main_grad(
            hidden, rows=problem.rows, labels=problem.labels, row_scale=problem.weights
        )
        return losses.square().sqrt()

    (
        checkpoint(run, problem.hidden.clamp(-1, 1), use_reentrant=use_reentrant) * problem.weights
    ).sum().backward()
    problem.hidden = problem.hidden.detach().clamp(-1, 1)
    assert_close(
        layer_with_main_grad.weight.main_grad,
        problem.plain(layer_with_main_grad)[2],
        tolerance=2e-2,
    )


def test_forward_dropped_without_backward_is_refused_until_gradients_are_zeroed(
    layer_with_main_grad: OutputLayer,
) -> None:
    problem = make_problem(dtype=torch.bfloat16)
    layer_with_main_grad(problem.hidden, rows=problem.rows, labels=problem.labels)
    with pytest.raises(VitaError, match="dropped without its backward"):
        problem.run(layer_with_main_grad)
    layer_with_main_grad.weight.main_grad.zero_()
    # both by megatron-core's zero_grad_buffer
    layer_with_main_grad.weight.grad_added_to_main_grad = False
    problem.run(layer_with_main_grad)
    assert_close(
        layer_with_main_grad.weight.main_grad,
        problem.plain(layer_with_main_grad)[2],
        tolerance=1e-2,
    )


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_made_for_row_scale_and_any_other_is_refused(scale: float) -> None:
    layer = make_layer()
    problem = make_problem()
    problem.weights = torch.full_like(problem.weights, scale)
    expected = problem.plain(layer)[1]
    losses = layer(problem.hidden, rows=problem.rows, labels=problem.labels, row_scale=scale)
    (scale * losses).sum().backward()
    assert_close(problem.hidden.grad, expected)
    if platform.on_cuda():
        return  # there an assertion on the device ends the process
    losses = layer(problem.hidden, rows=problem.rows, labels=problem.labels, row_scale=scale)
    with pytest.raises(VitaError, match="row_scale"):
        (2 * scale * losses).sum().backward()


@pytest.mark.parametrize("full_logits", [False, True])
def test_logits_of_wanted_rows_carry_gradients(full_logits: bool) -> None:
    layer = make_layer(full_logits=full_logits)
    problem = make_problem()
    logits = layer(problem.hidden, rows=problem.rows)
    assert_close(logits, (problem.hidden.squeeze(1) @ layer.weight.T)[problem.rows].detach())
    F.cross_entropy(logits, problem.labels.to(logits.device), reduction="none").mul(
        problem.weights
    ).sum().backward()
    _, hidden_grad, weight_grad = problem.plain(layer)
    assert_close(problem.hidden.grad, hidden_grad)
    assert_close(layer.weight.grad, weight_grad)


def test_nothing_of_the_size_of_the_logits_is_kept_for_backward() -> None:
    layer = make_layer(chunk_rows=2)
    problem = make_problem("all")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        losses = layer(problem.hidden, rows=problem.rows, labels=problem.labels)
    held = [x for x in vars(losses.grad_fn).values() if isinstance(x, Tensor)]
    assert not [
        shape for shape in (*kept, *(x.shape for x in held)) if LENGTH in shape and VOCAB in shape
    ]
    assert [tuple(x.shape) for x in held] == [(LENGTH, HIDDEN)]


@pytest.mark.parametrize("label", [-100, VOCAB])
def test_label_that_is_no_token_is_refused(label: int) -> None:
    layer = make_layer()
    problem = make_problem()
    problem.labels[2] = label
    with pytest.raises(VitaError, match=str(label)):
        problem.run(layer)


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing", 1.0), ("z_loss", -1.0), ("chunk_mib", 0)]
)
def test_option_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"model.output.{name}"):
        OutputConfig(**{name: value})
