"""A training run's objects, built from a recipe."""

import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vita import platform
from megatron_vita.checkpoint import shared_folder
from megatron_vita.checkpoint.claim import Claim
from megatron_vita.checkpoint.mirror import Mirror
from megatron_vita.checkpoint.retention import is_saved
from megatron_vita.checkpoint.saver import by_first
from megatron_vita.config import NumericsConfig, Recipe
from megatron_vita.config.run_files import LEDGERS
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.data.loading.ledger import Damage, Ledger, merge_damage, read_ledgers
from megatron_vita.data.loading.loader import start_fork_server
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.errors import CheckpointError
from megatron_vita.model.build import build_chunks, freeze_parts
from megatron_vita.model.quantized import packed_tensors
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.rounding import ceil_div
from megatron_vita.supervise.beacon import Beacon, Phase
from megatron_vita.training.metrics.meter import Meter, Reduce
from megatron_vita.training.metrics.metrics import check_record
from megatron_vita.training.optimizer import state as optimizer_state
from megatron_vita.training.optimizer.optimizer import (
    CheckedOptimizer,
    build_optimizer,
    check_optimizer,
    wrap_for_data_parallel,
)
from megatron_vita.training.run.fitting import choose_levers
from megatron_vita.training.run.guard import Guard
from megatron_vita.training.run.host_buffers import open_activation_store
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run_state import restore_newest
from megatron_vita.training.run.skipped import SkippedPacks, read_skipped
from megatron_vita.training.run.stop_signal import StopRequest
from megatron_vita.training.run.streams import open_streams

if TYPE_CHECKING:
    from megatron_vita.training.run.hooks import Hooks

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class Run:
    """All objects of a training run on this rank, and its position."""

    recipe: Recipe
    chunks: list[DistributedDataParallel]  # this rank's, one but for interleaved pipelines
    optimizer: CheckedOptimizer
    schedule: OptimizerParamScheduler
    microbatches: int
    train_stream: PackStream | None = None
    validation_stream: PackStream | None = None
    # Samples that this rank's replica could not read.
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    guard: Guard = dataclasses.field(default_factory=lambda: Guard(NumericsConfig()))
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)
    stop_reason: str = ""  # of `request_stop` on this rank
    meter: Meter = dataclasses.field(default_factory=Meter)  # the loop's own, of one step
    recorded: Meter = dataclasses.field(
        default_factory=Meter
    )  # of `record`, until a step is logged
    hooks: "Hooks | None" = None
    beacon: Beacon | None = None  # tells the watcher where this rank is; None: nobody watches
    matmul_rate: float = 0.0  # FLOP/s of large matrix products on the slowest device; 0: unknown
    data_seconds: float = 0.0  # that this rank has waited for packs
    step: int = 0
    consumed_packs: int = 0  # of the plan, with those that were left out before them
    skipped: SkippedPacks = dataclasses.field(default_factory=SkippedPacks)
    claim: Claim | None = None  # to the folder that the run saves to
    base_stamp: str = ""  # of the weights beside adapters, which checkpoints leave out

    def record(
        self,
        name: str,
        value: float | torch.Tensor,
        *,
        reduce: Reduce = "mean",
        weight: float = 1.0,
    ) -> None:
        """Add a metric to the log, from any rank, as often as wanted.

        value: a number, or a tensor of one, which is read only when a step is logged.
        reduce: over all ranks and all calls since the step that was logged last.
        weight: of this value in a `mean`, such as its number of rows.

        Raises:
            ConfigError: the name is the loop's own, or the value or the reduction cannot be.
        """
        check_record(self.recorded, name, value, reduce=reduce)
        if isinstance(value, torch.Tensor):
            value = value.detach().reshape(())
        self.recorded.add(name, value, reduce=reduce, weight=weight)

    def enter(self, phase: Phase, **where: Any) -> None:
        """Note what this rank does from now on, as `Beacon.enter` does, if the run is watched."""
        if self.beacon is not None:
            self.beacon.enter(phase, **where)

    def request_stop(self, reason: str) -> None:
        """Ask the run, from a hook on any rank, to save after its next step and to end with
        StoppedError, as after a signal.

        reason: appears in the message that the run ends with.
        """
        self.stop_reason = self.stop_reason or reason

    @property
    def next_pack(self) -> int:
        """The first pack of the next step."""
        size = self.recipe.training.global_batch_size
        return self.skipped.next_first(self.consumed_packs, size=size)

    @property
    def unwrapped_models(self) -> list[VitaModel]:
        """The model chunks without their data-parallel wrappers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def unwrapped_model(self) -> VitaModel:
        """The only chunk of a rank without interleaving."""
        (model,) = self.unwrapped_models
        return model

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield this rank's parameters by name, with the chunk where there are several."""
        for prefix, model in self._named_models():
            for name, parameter in model.named_parameters():
                yield prefix + name, parameter

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's parameters, and the tensors of 4-bit weights, as `named_parameters`."""
        yield from self.named_parameters()
        for prefix, model in self._named_models():
            for name, tensor in packed_tensors(model):
                yield prefix + name, tensor

    def _named_models(self) -> Iterator[tuple[str, VitaModel]]:
        for i, model in enumerate(self.unwrapped_models):
            prefix = ""
            if len(self.chunks) > 1:
                prefix = f"chunk {i}: "
            yield prefix, model

    @property
    def rows_per_tile(self) -> int:
        """Feature rows of a tile."""
        return self.recipe.model.vision.image_token_length

    @property
    def ledger_folder(self) -> Path | None:
        """Folder of the ledgers of damaged samples, beside the checkpoints; None without any."""
        if self.recipe.checkpoint.save:
            return Path(self.recipe.checkpoint.save) / LEDGERS
        return None

    def read_damage(self) -> list[Damage]:
        """Return the plan's damaged samples from all ledgers, each once.

        Ledgers are those on disk, of the resumed checkpoint, and of this rank.
        """
        noted: list[Damage] = []
        if self.ledger_folder:
            noted = read_ledgers(self.ledger_folder)
        # The same event may be in several; a plan continued with other data has other samples in
        # the places of some.
        events = dict.fromkeys([*self.ledger.events(), *noted])
        return merge_damage(
            event for event in events if self.train_stream is None or self.train_stream.fits(event)
        )

    @property
    def train_sources(self) -> list[str]:
        """Names of the training datasets."""
        return [dataset.name for dataset in self.recipe.data.train]

    @property
    def validation_sources(self) -> list[str]:
        """Names of the held-out datasets."""
        return [dataset.name for dataset in self.recipe.data.validation]


def open_run(recipe: Recipe, *, folder: Path | None = None, up_to: int | None = None) -> Run:
    """Build a run and load the latest checkpoint or the initial weights. Collective.

    Args:
        recipe: a checked recipe.
        folder: of the checkpoints, and of what rollbacks have left out; None: `checkpoint.save`.
        up_to: step of the newest checkpoint that may be loaded; None: any.
    """
    replicas = recipe.data_parallel_size(dist.get_world_size())
    # Measured first, while the device is idle and its memory free.
    matmul_rate = _slowest_matmul()
    optimizer_state.check_state_can_be_saved(recipe)
    claim = None
    if recipe.checkpoint.save:
        shared_folder.check_shared(
            Path(recipe.checkpoint.save),
            size=checkpoint_bytes(recipe),
            count=min(_kept_at_most(recipe) + 1, _checkpoints(recipe)),
        )
        # Before the newest checkpoint is chosen: an earlier job could save and delete meanwhile.
        claim = Claim(Path(recipe.checkpoint.save))
        by_first(claim.take)
        fetch_from_mirror(recipe)
    # Read once, after all ranks agreed on the newest checkpoint, and passed on.
    resume = ResumePoint.find(recipe)
    if folder is not None:
        resume = ResumePoint.find_in(folder, up_to=up_to)
    # Early: its start takes seconds, in which the model is built.
    if recipe.data.num_workers:
        start_fork_server()
    groups.initialize_groups(recipe.parallel)
    layout = groups.rank_layout()
    encodes = groups.is_first_stage() and not recipe.model.text_only
    # Later stages read packs for their labels alone, and decode no tiles.
    share = None
    if encodes:
        share = (layout.tile_rank, layout.tile_ranks)
    logger.info("reading the plan %s and its shards' indexes", recipe.data.plan)
    skipped = read_skipped(folder or recipe.checkpoint.save)
    open_packs = partial(open_streams, recipe, skipped=skipped, tile_share=share, replicas=replicas)
    streams = open_packs(resume=resume)
    logger.info("building the model")
    run = assemble_run(recipe)
    run.matmul_rate = matmul_rate
    run.claim = claim
    resumed = restore_newest(run, resume, up_to=up_to)
    if resumed is not resume:
        streams = open_packs(resume=resumed)
    run.train_stream, run.validation_stream = streams
    run.skipped = skipped
    return run


def fetch_from_mirror(recipe: Recipe) -> None:
    """Download the newest checkpoint of `checkpoint.mirror` if `checkpoint.save` has none.
    Collective.

    Raises:
        CheckpointError: on all ranks, if the store fails.
    """
    folder = Path(recipe.checkpoint.save)

    def fetch() -> None:
        if not any(is_saved(path) for path in folder.iterdir()):
            try:
                found = Mirror(recipe.checkpoint.mirror).fetch(folder)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint.mirror {recipe.checkpoint.mirror}: cannot be fetched: {error}"
                ) from error
            if found:
                logger.info("fetched %s from %s", found, recipe.checkpoint.mirror)

    if recipe.checkpoint.mirror:
        by_first(fetch)


def _checkpoints(recipe: Recipe) -> int:
    """Checkpoints that a run of all steps writes."""
    return ceil_div(recipe.training.train_iters, recipe.checkpoint.save_interval)


def _kept_at_most(recipe: Recipe) -> int:
    """Checkpoints that the rules of a whole run keep, if none is named by two of them."""
    checkpoint = recipe.checkpoint
    kept = checkpoint.keep + checkpoint.keep_best
    if checkpoint.keep_every:
        kept += recipe.training.train_iters // checkpoint.keep_every
    return kept


def _slowest_matmul() -> float:
    """Measure FLOP/s of large matrix products on the slowest device. Collective."""
    rate = torch.tensor(platform.measure_matmul(), dtype=torch.float64, device=platform.device())
    dist.all_reduce(rate, op=dist.ReduceOp.MIN)
    return rate.item()


def assemble_run(recipe: Recipe) -> Run:
    """Build the parts of a run that need no data, with initial weights. Groups must be
    initialized."""
    recipe = choose_levers(recipe)
    check_optimizer(recipe)
    models = build_chunks(recipe)
    # Before the wrappers, which make gradient buffers for what is trained.
    for model in models:
        freeze_parts(model, recipe)
    open_activation_store(models, recipe)
    chunks = [wrap_for_data_parallel(model, recipe) for model in models]
    optimizer, schedule = build_optimizer(chunks, recipe)
    return Run(
        recipe=recipe,
        chunks=chunks,
        optimizer=optimizer,
        schedule=schedule,
        guard=Guard(recipe.numerics),
        microbatches=recipe.training.global_batch_size // groups.data_parallel_group().size(),
    )
