"""The masked output layer: only rows that predict a scored token are gathered, projected and scored."""

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor

from megatron_vita.model.language import LanguageModel
from megatron_vita.parallel.collectives import gather_rows


def select_rows(hidden: Tensor, *, rows: Tensor, model: LanguageModel) -> Tensor:
    """The `rows` [L] of this CP rank's slice, in full on every TP rank: [L, H].

    `hidden` is [t / TP, 1, H] under sequence parallelism, where each rank picks its own rows and only those cross the
    TP group, and [t, 1, H] without. `rows` is ascending and on the host.
    """
    hidden = hidden.squeeze(1)
    if not model.config.sequence_parallel:
        return hidden[rows.to(hidden.device)]
    share = len(hidden)
    holder = rows // share
    mine = rows[holder == model.tp_group.rank()] % share
    counts = torch.bincount(holder, minlength=model.tp_group.size()).tolist()
    return gather_rows(hidden[mine.to(hidden.device)], counts=counts, group=model.tp_group)


def row_losses(rows: Tensor, *, labels: Tensor, model: LanguageModel) -> Tensor:
    """Cross entropy of each row in fp32: rows [L, H], labels [L] -> [L]."""
    logits = model.project(rows).float()
    if len(rows) == 0:
        return logits.sum(dim=-1)  # nothing to score, but the graph reaches every parameter
    return vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), tp_group=model.tp_group).squeeze(1)


def row_logits(rows: Tensor, *, model: LanguageModel) -> Tensor:
    """Logits of each row over the whole vocabulary, on every TP rank: rows [L, H] -> [L, V]."""
    return gather_from_tensor_model_parallel_region(model.project(rows), group=model.tp_group)
