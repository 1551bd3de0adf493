"""Comparison of the weights that replicas hold, by hash."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vita import platform
from megatron_vita.errors import VitaError
from megatron_vita.parallel import groups
from megatron_vita.sizes import counted
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_state import finish_param_gather

PIECE = 1 << 22
"""Words that are hashed at a time, which bounds the memory that a hash takes to 100 MB."""
LISTED = 10
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A parameter whose copies are not the same.

    ranks: those that hold another value than the majority; all of them if there is none.
    """

    parameter: str
    ranks: list[int]
    copies: int

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.ranks))
        if len(self.ranks) < self.copies:
            plural = "s" if len(self.ranks) > 1 else ""
            return f"{self.parameter} on rank{plural} {listed}, of {self.copies} copies"
        return f"{self.parameter} on ranks {listed} (no value is held by a majority)"


class ReplicaCallback(Callback):
    """Comparison every so many steps, and before each checkpoint is written.

    steps: `numerics.compare_weights_steps`.
    is_saved: tells whether a step will be saved, the same on all ranks.
    """

    collective = True  # raises on all ranks at once

    def __init__(
        self,
        *,
        steps: int,
        is_saved: Callable[[Run, StepMetrics], bool] = lambda run, metrics: False,
    ) -> None:
        self._steps = steps
        self._is_saved = is_saved
        self._equal_until = 0

    def on_start(self, run: Run) -> None:
        """Note where the run begins."""
        self._equal_until = run.step

    def on_rollback(self, run: Run, step: int) -> None:
        """Note that the run begins there again."""
        self._equal_until = min(self._equal_until, run.step)

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Compare, if it is time to. Collective then.

        Raises:
            VitaError: on all ranks, naming parameters and ranks, if copies differ.
        """
        if run.step % self._steps and not self._is_saved(run, metrics):
            return
        found = find_divergences(run)
        if not found:
            self._equal_until = run.step
            return
        listed = "; ".join(map(str, found[:LISTED]))
        number = counted(len(found), "parameter")
        raise VitaError(
            f"step {run.step}: replicas hold different weights, which were the same after step "
            f"{self._equal_until}: {number}: {listed}. Nothing is saved of this step; look for a fault "
            f"of the ranks' devices, remove checkpoints after step {self._equal_until}, and resume"
        )


def find_divergences(run: Run) -> list[Divergence]:
    """Compare the copies of each parameter over DP and CP ranks. Collective.

    Returns:
        The parameters that differ, the same list on all ranks.
    """
    finish_param_gather(run)
    named = _named_parameters(run)
    hashes = torch.zeros(len(named), dtype=torch.int64, device=platform.device())
    for i, parameter in enumerate(named.values()):
        hashes[i] = hash_bits(parameter)
    group = groups.data_parallel_group(with_context_parallel=True)
    gathered = [torch.empty_like(hashes) for _ in range(group.size())]
    dist.all_gather(gathered, hashes, group=group)
    copies = torch.stack(gathered)  # [ranks, parameters]
    differs = (copies != copies[0]).any().to(torch.int32)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if not differs.item():
        return []
    ranks = dist.get_process_group_ranks(group)
    mine = []
    # One of them tells: all ranks of the group have found the same.
    if group.rank() == 0:
        mine = _name(list(named), copies.t().tolist(), ranks)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return [found for theirs in of_ranks for found in theirs]


def _named_parameters(run: Run) -> dict[str, Tensor]:
    """Return this rank's parameters, with stage and chunk in their names where there are several."""
    stage = ""
    if run.recipe.parallel.pipeline_model_parallel_size > 1:
        stage = f"stage {groups.pipeline_rank()}: "
    return {f"{stage}{name}": tensor for name, tensor in run.named_weights()}


def _name(names: list[str], copies: list[list[int]], ranks: list[int]) -> list[Divergence]:
    """Return the parameters whose hashes differ; `copies` has those of all ranks by parameter."""
    found = []
    for name, hashes in zip(names, copies, strict=True):
        (value, count), *others = Counter(hashes).most_common()
        if not others:
            continue
        wrong = ranks
        if 2 * count > len(hashes):
            wrong = [rank for rank, own in zip(ranks, hashes, strict=True) if own != value]
        found.append(Divergence(parameter=name, ranks=wrong, copies=len(hashes)))
    return found


def hash_bits(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of a tensor's bits, on its device, without waiting for it.

    Each word counts times an odd number of its own, modulo 2**64: a change of one word always
    changes the hash.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in words.split(PIECE):
        factors = torch.arange(1, 2 * len(piece), 2, dtype=torch.int64, device=tensor.device)
        total = total * 31 + (piece.to(torch.int64) * factors).sum()
    return total
