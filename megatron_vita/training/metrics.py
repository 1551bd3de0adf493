"""What a step reports, summed over the replicas."""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.data.batch import Batch
from megatron_vita.layout.slicing import PackSlice
from megatron_vita.parallel import groups


@dataclass(kw_only=True)
class StepMetrics:
    """Sums of one step over all replicas, and what follows from them."""

    step: int
    loss: float  # per loss row
    loss_rows: int
    # per dataset, per loss row; datasets without a row are left out
    source_losses: dict[str, float]
    tokens: int  # without padding
    tiles: int
    fill: float  # tokens / positions
    documents: int
    damaged: int  # documents that could not be read
    seconds: float
    stops: bool = False  # some rank was told to stop
    grad_norm: float = 0.0
    lr: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of the global batch per second."""
        return self.tokens / self.seconds

    @property
    def tiles_per_second(self) -> float:
        """Tiles and frames of the global batch per second."""
        return self.tiles / self.seconds


@dataclass
class Meter:
    """Collects the sums of one step on this rank."""

    sources: list[str]
    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    positions: int = 0
    tiles: int = 0
    documents: int = 0
    damaged: int = 0
    stops: int = 0  # 1 where this rank was told to stop

    def __post_init__(self) -> None:
        # last row: the tail
        self.losses = torch.zeros(len(self.sources) + 1, 2, dtype=torch.float64)

    def add_batch(self, batch: Batch) -> None:
        """Counts a pack once for its whole replica; called where its losses are computed."""
        if groups.is_reporting_rank():
            self.tokens += batch.num_tokens
            self.positions += len(batch.input_ids)
            self.tiles += len(batch.placements)
            self.documents += len(batch.sample_keys)
            self.damaged += len(batch.masked)

    def add_losses(self, losses: torch.Tensor, *, batch: Batch, pack: PackSlice) -> None:
        """Adds the losses [L] of a slice to their documents' sources; each context-parallel rank
        adds its own."""
        if groups.tensor_group().rank() != 0:
            return
        positions = pack.positions[pack.loss_rows]
        document = torch.searchsorted(batch.document_starts, positions, right=True) - 1
        source = batch.document_sources[document]  # -1 is the tail, which has no loss row
        values = losses.detach().double().cpu()
        self.losses.index_add_(0, source, torch.stack([values, torch.ones_like(values)], dim=1))

    def reduce(self, step: int) -> StepMetrics:
        """Sums over the world. Collective."""
        names = ("tokens", "positions", "tiles", "documents", "damaged", "stops")
        counts = torch.tensor([getattr(self, name) for name in names], dtype=torch.float64)
        sums = torch.cat([self.losses.flatten(), counts]).to(platform.device())
        dist.all_reduce(sums)
        total_of = dict(zip(names, map(int, sums[-len(names) :].tolist()), strict=True))
        losses = sums[: -len(names)].view(-1, 2).cpu()
        total, rows = losses.sum(dim=0).tolist()
        return StepMetrics(
            step=step,
            loss=total / max(rows, 1),
            loss_rows=int(rows),
            source_losses={
                name: (loss / count).item()
                for name, (loss, count) in zip(self.sources, losses, strict=False)
                if count > 0
            },
            tokens=total_of["tokens"],
            tiles=total_of["tiles"],
            documents=total_of["documents"],
            damaged=total_of["damaged"],
            stops=total_of["stops"] > 0,
            fill=total_of["tokens"] / max(total_of["positions"], 1),
            seconds=time.perf_counter() - self.started,
        )
