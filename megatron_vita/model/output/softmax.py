"""Cross entropy and its gradient over vocabulary shards on TP ranks, for a chunk of rows.

A shard is summarized by four numbers a row; those of all shards, exchanged in one collective, give
the loss and all that the gradient needs. The gradient overwrites the logits. Plain torch on CPU,
Triton on CUDA.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Stands for the largest logit of a shard without columns. Finite, since the difference of two
# infinities would be NaN.
LOWEST = -1e30


@dataclass(frozen=True, kw_only=True)
class LossForm:
    """Cross entropy with label smoothing (as torch's `cross_entropy`) and z-loss (PaLM, section 5).

    For a row with logits x, log-sum-exp Z and target y over V tokens: loss = Z - (1 - smoothing)
    x[y] - smoothing mean(x) + z_loss Z^2.
    """

    vocab_size: int  # V, rows of padding not counted
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def losses(self, summary: "Summary") -> Tensor:
        """Compute the losses [r]."""
        smoothing = self.label_smoothing
        loss = summary.log_sum - (1 - smoothing) * summary.target
        if smoothing:
            loss = loss - smoothing / self.vocab_size * summary.total
        if self.z_loss:
            return loss + self.z_loss * summary.log_sum.square()
        return loss


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A TP rank's columns of the vocabulary."""

    start: int  # token of the first column
    columns: int  # columns that stand for a token; those after them are padding
    group: ProcessGroup


@dataclass(frozen=True)
class Summary:
    """Per-row statistics of all logits for the loss and its gradient: [r] each, fp32."""

    log_sum: Tensor
    target: Tensor
    total: Tensor  # sum of the logits


def summarize(logits: Tensor, *, targets: Tensor, shard: Shard) -> Summary:
    """Summarize logits [r, v]; targets [r] count from the shard's first column. Collective."""
    parts = _summarize_shard(logits, targets=targets, columns=shard.columns)[None]  # [1, 4, r]
    if shard.group.size() > 1:
        gathered = parts.new_empty(shard.group.size(), *parts.shape[1:])
        dist.all_gather_into_tensor(gathered, parts, group=shard.group)
        parts = gathered
    largest, exponentials, target, total = parts.unbind(1)  # [TP, r] each
    # Each shard summed exponentials relative to its own largest logit: bring them to a common one.
    peak = largest.amax(0)
    log_sum = peak + (exponentials * (largest - peak).exp()).sum(0).log()
    return Summary(log_sum, target.sum(0), total.sum(0))


def _summarize_shard(logits: Tensor, *, targets: Tensor, columns: int) -> Tensor:
    """Return [4, r]: largest logit, sum of exponentials relative to it, target's logit or 0,
    sum."""
    if logits.is_cuda:
        from megatron_vita.model.output.softmax_triton import summarize_on_cuda

        return summarize_on_cuda(logits, targets=targets, columns=columns)
    x = logits[:, :columns].float()
    if columns:
        largest = x.amax(1)
    else:
        largest = x.new_full((len(x),), LOWEST)  # padding alone
    # Other shards' targets are negative or beyond the columns.
    here = (targets >= 0) & (targets < columns)
    target = torch.zeros_like(largest)
    target[here] = x[here, targets[here]]
    return torch.stack([largest, (x - largest[:, None]).exp().sum(1), target, x.sum(1)])


def write_gradient(
    logits: Tensor,
    *,
    targets: Tensor,
    shard: Shard,
    summary: Summary,
    scale: Tensor,
    form: LossForm,
) -> None:
    """Overwrite logits [r, v] by the gradient of the sum of `scale` [r] times the losses."""
    # The loss's derivative by a logit is slope * softmax - floor, and less by aim for the target.
    slope = scale * (1 + 2 * form.z_loss * summary.log_sum)
    aim = scale * (1 - form.label_smoothing)
    floor = scale * (form.label_smoothing / form.vocab_size)
    if logits.is_cuda:
        from megatron_vita.model.output.softmax_triton import write_gradient_on_cuda

        factors = torch.stack([summary.log_sum, slope, aim, floor])
        write_gradient_on_cuda(logits, targets=targets, columns=shard.columns, factors=factors)
        return
    gradient = (logits[:, : shard.columns].float() - summary.log_sum[:, None]).exp_()
    gradient.mul_(slope[:, None]).sub_(floor[:, None])
    here = (targets >= 0) & (targets < shard.columns)
    gradient[here, targets[here]] -= aim[here]
    logits[:, : shard.columns] = gradient
    # The products that follow read all columns: padding must add nothing to them.
    logits[:, shard.columns :] = 0
