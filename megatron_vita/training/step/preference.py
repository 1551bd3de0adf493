"""Direct preference optimization: losses of pairs from log-probabilities of their answers.

The loss of a pair is -log sigmoid(beta * ((c - c') - (r - r'))) with the log-probabilities c of its
chosen and r of its rejected answer, and c', r' by the reference: the same model without its
adapters (Rafailov et al. 2023, equation 7; label smoothing: Mitchell 2023).

The gradient of a row depends on the sums over all rows of its pair, wherever they lie. So the last
stage first computes the rows' losses alone, sums them over context-parallel ranks, and then runs
the output layer again with the gradient of each row.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_vita.config import DpoConfig
from megatron_vita.data.batch import Batch
from megatron_vita.errors import DataError
from megatron_vita.layout.slicing import PackSlice
from megatron_vita.parallel import groups
from megatron_vita.platform.pinned import to_device
from megatron_vita.training.metrics.meter import Meter
from megatron_vita.training.metrics.metrics import PREFERENCES, LossSums
from megatron_vita.training.run.faults import PackLoss
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.step.objective import ScheduleLoss, count_tensor, report_losses


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of a pack, D of them, and the answers that a slice's loss rows belong to."""

    answers: Tensor  # [L] on the host: twice the pair's number, and 1 more for a rejected answer
    readable: Tensor  # numbers of the pairs that are not masked, on the host
    weights: Tensor  # [D] factors on their losses, 0 for masked ones, on the host
    sources: Tensor  # [D] their datasets, on the host

    def __len__(self) -> int:
        return len(self.weights)


def pairs_of(batch: Batch, pack: PackSlice) -> Pairs:
    """Find the pairs of a pack.

    Raises:
        DataError: a document of the pack is no pair.
    """
    starts = batch.rejected_starts
    if starts is None or (starts < 0).any():
        first = 0 if starts is None else int((starts < 0).nonzero()[0])
        key = batch.sample_keys[first] if batch.sample_keys else f"document {first + 1}"
        raise DataError(
            f"pack {batch.pack_id + 1}: sample {key} has no rejected answer, and dpo.beta trains "
            "pairs alone: give it a rejected_response, or leave its dataset out"
        )
    positions = pack.positions[pack.loss_rows]
    document = torch.searchsorted(batch.document_starts, positions, right=True) - 1
    is_rejected = positions >= starts[document]
    count = len(starts)
    weights = torch.ones(count)
    if batch.loss_weights is not None:
        weights = batch.loss_weights[batch.document_starts[:count].long()]
    weights[batch.masked] = 0.0
    return Pairs(
        answers=torch.where(is_rejected, 2 * document + 1, 2 * document),
        readable=torch.tensor(
            [i for i in range(count) if i not in batch.masked], dtype=torch.int64
        ),
        weights=weights,
        sources=batch.document_sources[:count],
    )


def sum_answers(losses: Tensor, pairs: Pairs) -> Tensor:
    """Sum the log-probabilities of each answer [D, 2], chosen and rejected. Collective over CP.

    Args:
        losses: negative log-probabilities [L] of the slice's loss rows.
        pairs: the pairs of the pack.
    """
    sums = torch.zeros(2 * len(pairs), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, to_device(pairs.answers, losses.device), -losses.detach().double())
    group = groups.context_group()
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return sums.view(-1, 2)


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """Losses of pairs [D], and what they were computed from."""

    losses: Tensor
    slopes: Tensor  # derivatives by the margin [D]
    rewards: Tensor  # [D, 2]: beta times the log-probabilities beyond the reference's

    @property
    def margins(self) -> Tensor:
        """Rewards of chosen answers beyond those of rejected ones [D]."""
        return self.rewards[:, 0] - self.rewards[:, 1]


def pair_losses(policy: Tensor, reference: Tensor, config: DpoConfig) -> PairLosses:
    """Compute losses of pairs from the log-probabilities of their answers, [D, 2] each."""
    rewards = config.beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    exchanged = config.label_smoothing
    losses = (exchanged - 1) * F.logsigmoid(margins) - exchanged * F.logsigmoid(-margins)
    slopes = exchanged * margins.sigmoid() - (1 - exchanged) * (-margins).sigmoid()
    return PairLosses(losses=losses, slopes=slopes, rewards=rewards)


class ReferenceObjective:
    """Sum of the reference's log-probabilities by answer; nothing is trained."""

    row_scale = 1.0

    def __init__(self, batch: Batch, pack: PackSlice, *, found: dict[int, Tensor]) -> None:
        """`found` receives the sums [D, 2] by the pack's number."""
        self._number = batch.pack_id
        self._pairs = pairs_of(batch, pack)
        self._found = found

    def finish(self, losses: Tensor) -> ScheduleLoss:
        """Keep the sums of the losses [L]. Collective over CP."""
        self._found[self._number] = sum_answers(losses, self._pairs)
        return losses.sum(), count_tensor(len(losses), losses), {}


class PreferenceObjective:
    """Mean loss of all pairs, each multiplied by its sample's weight."""

    def __init__(
        self,
        batch: Batch,
        pack: PackSlice,
        *,
        config: DpoConfig,
        reference: Tensor | None,
        meter: Meter,
        losses: LossSums,
        packs: list[PackLoss],
        hooks: Hooks | None,
    ) -> None:
        """`reference`: sums of the pack's answers [D, 2]; None before the last stage."""
        self._batch = batch
        self._pack = pack
        self._pairs = pairs_of(batch, pack)
        self._config = config
        self._reference = reference
        self._meter = meter
        self._losses = losses
        self._packs = packs
        self._hooks = hooks
        self._scale = torch.empty(0)

    def row_scale(self, losses: Tensor) -> Tensor:
        """Return the gradient of each row's loss [L] from all rows' losses. Collective over CP."""
        assert self._reference is not None, "the reference runs before"
        device = losses.device
        policy = sum_answers(losses, self._pairs)
        pairs = pair_losses(policy, self._reference, self._config)
        self._report(pairs, policy)
        weights = to_device(self._pairs.weights, device)
        # A row's loss is its negative log-probability: chosen ones lower the margin by it.
        of_chosen = -self._config.beta * pairs.slopes * weights
        by_answer = torch.stack([of_chosen, -of_chosen], dim=1).view(-1)
        self._scale = by_answer[to_device(self._pairs.answers, device)].float()
        return self._scale

    def finish(self, losses: Tensor) -> ScheduleLoss:
        """Return a sum of the losses [L] with the gradient of the pairs' losses, and the number of
        pairs."""
        report_losses(losses, batch=self._batch, pack=self._pack, hooks=self._hooks)
        # All context-parallel ranks have the same pairs, which count once.
        count = 0
        if groups.context_group().rank() == 0:
            count = len(self._pairs.readable)
        return (losses * self._scale).sum(), count_tensor(count, losses), {}

    def _report(self, pairs: PairLosses, policy: Tensor) -> None:
        """Add the pairs to the metrics, on one rank of the replica."""
        known = self._pairs
        is_first = groups.context_group().rank() == 0 and groups.tensor_group().rank() == 0
        count = len(known.readable)
        if not is_first or not count:
            return
        readable = to_device(known.readable, policy.device)
        losses = pairs.losses * to_device(known.weights, policy.device)
        self._losses.add_items(losses[readable], sources=known.sources[known.readable])
        self._packs.append(PackLoss(self._batch.pack_id, losses.sum(), count))
        values = {
            "rewards/accuracies": (pairs.margins > 0).double(),
            "rewards/margins": pairs.margins,
            "rewards/chosen": pairs.rewards[:, 0],
            "rewards/rejected": pairs.rewards[:, 1],
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        assert values.keys() == set(PREFERENCES)
        for name, value in values.items():
            self._meter.add(name, value[readable].mean(), reduce="mean", weight=count)
