"""The output layer over the vocabulary shards of two ranks, of every kind, against plain PyTorch.

Also a worker of its own, for GPUs: writes {case: largest relative error} to the file that it is
given.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import OutputConfig, ParallelConfig, Recipe
from megatron_vita.model.build import transformer_config
from megatron_vita.model.output.output import OutputLayer
from megatron_vita.parallel import groups

LENGTH = 24
HIDDEN = 16
ROWS = {"both ranks": [1, 2, 11, 20], "one rank": [2, 5], "none": [], "all": list(range(LENGTH))}
VOCABULARIES = (50, 51, 1)  # 51 leaves a row of padding, 1 leaves the second rank without a token


def relative(actual: Tensor, expected: Tensor) -> float:
    """Distance relative to the norm of `expected`, or to that of `actual` where `expected` is zero."""
    return ((actual - expected).norm() / (expected.norm() if expected.any() else 1.0)).item()


def layer_over_shards(
    recipe: Recipe, vocab_size: int, whole: Tensor, *, frozen: bool, main_grad: bool
) -> OutputLayer:
    """Output layer with this rank's rows of the whole weight [V, H]."""
    config = transformer_config(recipe, fused=False)
    config.hidden_size = HIDDEN
    config.init_method = torch.nn.init.zeros_
    options = OutputConfig(label_smoothing=0.1, z_loss=0.01)
    layer = OutputLayer(config, vocab_size=vocab_size, options=options, owns_weight=True)
    layer.chunk_bytes = 3 * 4 * len(layer.weight)
    with torch.no_grad():
        layer.weight.fill_(7.0)  # rows of padding, if they counted, would be seen
        layer.weight[: layer.shard.columns] = whole[layer.shard.start :][: layer.shard.columns]
    layer.weight.requires_grad_(not frozen)
    if main_grad:
        layer.weight.main_grad = torch.zeros_like(layer.weight)
    return layer


def whole_gradient(layer: OutputLayer, vocab_size: int) -> Tensor:
    """Weight gradient of all ranks; checks that gradients of padding are zero."""
    mine = layer.weight.main_grad if hasattr(layer.weight, "main_grad") else layer.weight.grad
    assert not mine[layer.shard.columns :].any()
    parts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)[:vocab_size]


def shard_case(
    recipe: Recipe, rows: list[int], vocab_size: int, *, frozen: bool, main_grad: bool, seed: int
) -> float:
    """Largest relative error of losses, logits and gradients of one output layer against plain
    PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    device = platform.device()
    whole = torch.randn(vocab_size, HIDDEN, generator=generator).to(device).requires_grad_()
    hidden = torch.randn(LENGTH, 1, HIDDEN, generator=generator).to(device).requires_grad_()
    chosen = torch.tensor(rows, dtype=torch.int64)
    labels = torch.randint(0, vocab_size, (len(rows),), generator=generator)
    layer = layer_over_shards(
        recipe, vocab_size, whole.detach(), frozen=frozen, main_grad=main_grad
    )
    logits = (hidden.squeeze(1) @ whole.T)[chosen]
    expected = F.cross_entropy(logits, labels.to(device), reduction="none", label_smoothing=0.1)
    expected = expected + 0.01 * logits.logsumexp(-1).square()
    hidden_grad, weight_grad = torch.autograd.grad(expected.sum(), (hidden, whole))
    share = slice(0, LENGTH)
    if recipe.parallel.sequence_parallel:
        share = slice(dist.get_rank() * LENGTH // 2, (dist.get_rank() + 1) * LENGTH // 2)
    mine = hidden.detach()[share].clone().requires_grad_()
    losses = layer(mine, rows=chosen, labels=labels)
    losses.sum().backward()
    errors = [relative(losses.detach(), expected.detach()), relative(mine.grad, hidden_grad[share])]
    if not frozen:
        errors.append(relative(whole_gradient(layer, vocab_size), weight_grad))
    with torch.no_grad():
        errors.append(relative(layer(mine, rows=chosen), logits.detach()))
    return max(errors)


def vocabulary_shards() -> dict[str, float]:
    """Check every kind of output layer on TP2, with and without sequence parallelism."""
    found = {}
    for sequence_parallel in (False, True):
        parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
        recipe = Recipe(parallel=parallel)
        groups.initialize_groups(recipe.parallel)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        kinds = itertools.product(ROWS, VOCABULARIES, ("weight", "main_grad", "frozen"))
        for seed, (rows, vocab_size, kind) in enumerate(kinds):
            found[f"{sequence_parallel=}, {rows}, {vocab_size}, {kind}"] = shard_case(
                recipe,
                ROWS[rows],
                vocab_size,
                frozen=kind == "frozen",
                main_grad=kind == "main_grad",
                seed=seed,
            )
    return found


if __name__ == "__main__":
    platform.initialize_process()
    errors = vocabulary_shards()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(errors))
    platform.destroy_process_group()
