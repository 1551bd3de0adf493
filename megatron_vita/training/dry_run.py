"""Dry run: builds stages on the meta device in a fake world, estimates memory, reads first
packs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vita.config import Recipe
from megatron_vita.costs.memory.host_memory import HostMemory, host_memory
from megatron_vita.costs.memory.memory import PackLoad, RankMemory, full_pack, rank_memory
from megatron_vita.costs.memory.parameters import StageParameters, stage_parameters
from megatron_vita.costs.prediction import Prediction, predict
from megatron_vita.costs.stages import even_ends, stage_flops
from megatron_vita.costs.step_time import RANKS_PER_NODE
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.layout.assignment import assign_packs, assign_tiles
from megatron_vita.layout.counts import count_by_rank
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.model.build import build_on_meta
from megatron_vita.model.quantized import parameter_count
from megatron_vita.parallel import groups
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.skipped import read_skipped
from megatron_vita.training.run.streams import open_streams, pack_costs

PACKS_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """A pack of the plan, by the ranks that share it."""

    pack_id: int
    lengths: list[int]  # tokens of its documents
    segments: list[int]  # the same; of pairs, the padded lengths of both conversations
    tokens: np.ndarray  # [CP] padding not counted
    tiles: np.ndarray  # [tile ranks]
    loss_tokens: np.ndarray  # [CP, TP] in the part of the sequence of each rank

    @property
    def load(self) -> PackLoad:
        """Tiles and loss tokens of the pack."""
        return PackLoad(tiles=int(self.tiles.sum()), loss_tokens=int(self.loss_tokens.sum()))


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """A pipeline stage, as seen by one of its ranks."""

    ranks: range  # of the first replica
    layers: int
    parameters: StageParameters
    trained: int
    memory: RankMemory
    host: HostMemory
    flops: int  # for the first pack


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """All results of a dry run."""

    world_size: int
    data_parallel: int
    stages: list[StageReport]
    packs: list[PackReport]
    step_costs: list[int]  # of each replica's packs of the first step; empty without data
    prediction: Prediction  # for packs as heavy as the heaviest of those read
    # layers of first and last stage that would load the stages more evenly
    better_ends: tuple[int, int] | None


def dry_run(
    recipe: Recipe,
    *,
    world_size: int,
    with_data: bool = True,
    device: str = "",
    ranks_per_node: int = RANKS_PER_NODE,
) -> DryRun:
    """Build every pipeline stage and read the next packs.

    Args:
        recipe: the recipe of the run.
        world_size: ranks of the run.
        with_data: read the plan; else packs are assumed to be as `full_pack`.
        device: name of the GPU for which the step time is predicted; empty for none.
        ranks_per_node: ranks of a node.

    Raises:
        VitaError: an error that would stop the run at its start.
    """
    data_parallel = recipe.data_parallel_size(world_size)
    resume = ResumePoint.find(recipe)
    skipped = read_skipped(recipe.checkpoint.save)
    first = skipped.next_first(resume.consumed_packs, size=recipe.training.global_batch_size)
    packs: list[PackReport] = []
    step_costs: list[int] = []
    if with_data:
        stream, _ = open_streams(
            recipe, resume=resume, skipped=skipped, tile_share=None, replicas=data_parallel
        )
        shown = range(first, min(first + PACKS_SHOWN, len(stream)))
        packs = [_report_pack(recipe, stream, pack) for pack in shown]
        step_costs = _step_costs(recipe, stream, data_parallel, first=first)
    load, lengths = _heaviest(recipe, packs)
    flops = stage_flops(recipe, load, lengths=lengths)
    stages = [
        _report_stage(recipe, stage, world_size=world_size, load=load, flops=flops[stage])
        for stage in range(recipe.parallel.pipeline_model_parallel_size)
    ]
    return DryRun(
        world_size=world_size,
        data_parallel=data_parallel,
        stages=stages,
        packs=packs,
        step_costs=step_costs,
        prediction=predict(
            recipe,
            replace(load, lengths=tuple(lengths)),
            world_size=world_size,
            device=device,
            ranks_per_node=ranks_per_node,
        ),
        better_ends=_better_ends(recipe, load, lengths),
    )


def _report_pack(recipe: Recipe, stream: PackStream, pack_id: int) -> PackReport:
    batch = stream[pack_id]
    parallel = recipe.parallel
    tp = parallel.tensor_model_parallel_size
    cp = parallel.context_parallel_size
    lengths = stream.plan.lengths_of(pack_id).tolist()
    # Documents are padded at their ends: their lengths in the plan are without the padding.
    is_token = torch.zeros(len(batch.input_ids), dtype=torch.bool)
    for start, length in zip(batch.document_starts.tolist(), lengths, strict=False):
        is_token[start : start + length] = True
    segments = lengths
    if recipe.dpo.beta:
        segments = batch.conversation_lengths
    return PackReport(
        pack_id=pack_id,
        lengths=lengths,
        segments=segments,
        tokens=count_by_rank(is_token, batch.cu_seqlens, tp_size=1, cp_size=cp).flatten().numpy(),
        tiles=np.array(
            [len(assigned) for assigned in assign_tiles(batch.frames, parallel.tile_ranks)]
        ),
        loss_tokens=count_by_rank(
            batch.labels != IGNORED_LABEL, batch.cu_seqlens, tp_size=tp, cp_size=cp
        ).numpy(),
    )


def _heaviest(recipe: Recipe, packs: list[PackReport]) -> tuple[PackLoad, list[int]]:
    """Return the most tiles and loss tokens of the packs read, and the first one's segments."""
    if not packs:
        assumed = full_pack(recipe)
        return assumed, list(assumed.lengths)
    loads = [pack.load for pack in packs]
    heaviest = PackLoad(
        tiles=max(load.tiles for load in loads), loss_tokens=max(load.loss_tokens for load in loads)
    )
    return heaviest, packs[0].segments


def _report_stage(
    recipe: Recipe, stage: int, *, world_size: int, load: PackLoad, flops: int
) -> StageReport:
    parallel = recipe.parallel
    ranks = world_size // parallel.pipeline_model_parallel_size
    parameters = stage_parameters(recipe, stage)
    # Pipeline stages are the outermost dimension of ranks.
    first = stage * ranks
    with _fake_world(recipe, rank=first, world_size=world_size):
        built = sum(map(parameter_count, build_on_meta(recipe)))
    # The costs are derived from a recipe alone; here they are checked against the model itself.
    assert built == parameters.total, (
        f"stage {stage}: {built} parameters were built, {parameters.total} planned"
    )
    data_parallel = world_size // parallel.replica_size
    return StageReport(
        ranks=range(
            first, first + parallel.tensor_model_parallel_size * parallel.context_parallel_size
        ),
        layers=parallel.layers_of_stages(recipe.model.language.num_layers)[stage],
        parameters=parameters,
        trained=parameters.trainable(recipe),
        memory=rank_memory(recipe, stage, data_parallel=data_parallel, load=load),
        host=host_memory(recipe, stage, data_parallel=data_parallel, load=load),
        flops=flops,
    )


@contextlib.contextmanager
def _fake_world(recipe: Recipe, *, rank: int, world_size: int) -> Iterator[None]:
    """Make this process one rank of a world without communication."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        groups.initialize_groups(recipe.parallel, with_gloo=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _step_costs(recipe: Recipe, stream: PackStream, data_parallel: int, *, first: int) -> list[int]:
    # A complete run may have no step left in its plan.
    if first + recipe.training.global_batch_size > len(stream):
        return []
    costs = pack_costs(recipe, stream.plan, first=first)
    return [
        sum(costs[pack] for pack in assigned) for assigned in assign_packs(costs, data_parallel)
    ]


def _better_ends(recipe: Recipe, load: PackLoad, lengths: list[int]) -> tuple[int, int] | None:
    parallel = recipe.parallel
    # megatron-core allows uneven ends only without interleaving.
    if parallel.pipeline_model_parallel_size == 1 or parallel.virtual_size is not None:
        return None
    now = parallel.layers_of_stages(recipe.model.language.num_layers)
    better = even_ends(recipe, load, lengths=lengths)
    if better == (now[0], now[-1]):
        return None
    return better
