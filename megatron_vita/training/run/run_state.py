"""Saving a run's state and restoring it."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_vita.checkpoint import base, store
from megatron_vita.checkpoint.claim import Claim
from megatron_vita.checkpoint.retention import Retention
from megatron_vita.checkpoint.saver import Saver
from megatron_vita.config import Recipe, recipe_from_dict
from megatron_vita.costs.memory.checkpoint_size import checkpoint_bytes
from megatron_vita.data.loading.ledger import Damage, Ledger
from megatron_vita.errors import CheckpointError, DamagedCheckpointError
from megatron_vita.training.optimizer import state as optimizer_state
from megatron_vita.training.run.resume import ResumePoint, changed_fields, check_parts

if TYPE_CHECKING:
    from megatron_vita.training.run.run import Run

logger = logging.getLogger(__name__)


def restore_newest(run: "Run", resume: ResumePoint, *, up_to: int | None = None) -> ResumePoint:
    """Restore from `resume`, or from the newest checkpoint before it whose bytes are whole.
    Collective.

    up_to: step of the newest that may be taken; None: any.

    Returns:
        The point that was resumed from.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    damaged: dict[str, str] = {}
    while True:
        try:
            restore(run, resume)
            return resume
        except DamagedCheckpointError as error:
            # The recipe names the weights to start from: no others may replace them.
            if resume.checkpoint is None:
                raise
            damaged[resume.checkpoint.name] = str(error)
            folder = resume.checkpoint.parent
            resume = ResumePoint.find_in(folder, up_to=up_to, damaged=damaged)


def open_saver(
    recipe: Recipe,
    *,
    in_background: bool,
    claim: Claim | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Saver:
    """Return the saver of a recipe's runs."""
    return Saver(
        Path(recipe.checkpoint.save),
        retention=retention_of(recipe),
        tokenizer=recipe.text.tokenizer,
        size=checkpoint_bytes(recipe),
        in_background=in_background,
        claim=claim,
        on_progress=on_progress,
    )


def retention_of(recipe: Recipe) -> Retention:
    """Return the rules by which a recipe's checkpoints are kept."""
    checkpoint = recipe.checkpoint
    return Retention(
        last=checkpoint.keep,
        every=checkpoint.keep_every,
        best=checkpoint.keep_best,
        metric=checkpoint.best_metric,
        mode=checkpoint.best_mode,
    )


def save_run(run: "Run") -> Path:
    """Save the run's state to `checkpoint.save`, and return the checkpoint. Collective.

    Raises:
        SaveError: on all ranks, if it cannot be written.
    """
    saver = open_saver(run.recipe, in_background=False)
    start_save(run, saver)
    return saver.finish()


def start_save(run: "Run", saver: Saver) -> None:
    """Begin to save the run's state; the next step may follow. Collective.

    Raises:
        SaveError: on all ranks, if nothing can be written.
    """
    finish_param_gather(run)
    saver.start(step=run.step, state=_state(run, loading=False), manifest=_manifest(run))


def _manifest(run: "Run") -> dict[str, Any]:
    # The first rank alone writes it, and reading all ledgers takes time.
    if dist.get_rank() != 0:
        return {}
    digest = ""
    if run.train_stream:
        digest = run.train_stream.plan.digest_before(run.consumed_packs)
    values = {
        "consumed_packs": run.consumed_packs,
        "plan_digest": digest,
        "recipe": dataclasses.asdict(run.recipe),
        "damaged": [damage._asdict() for damage in run.read_damage()],
        "numerics": run.guard.state(),
    }
    if run.recipe.lora.rank:
        values[base.BASE] = {"path": _base_path(run.recipe), "stamp": run.base_stamp}
    return values


def _base_path(recipe: Recipe) -> str:
    """Return the place of the base, wherever the checkpoint is read from; empty for initial
    weights."""
    load = recipe.checkpoint.load
    return str(Path(load).absolute()) if load else ""


def finish_param_gather(run: "Run") -> None:
    """Wait for updated weights that are still being gathered for the next forward pass.
    Collective."""
    # Disabling the hooks waits for the gathers under way; enabling them arms the next pass again.
    if run.recipe.parallel.overlap_param_gather:
        for chunk in run.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()


def _state(run: "Run", *, loading: bool) -> dict[str, Any]:
    model = store.model_state(run.unwrapped_models)
    if run.recipe.lora.rank:
        model = base.trained_state(model, run.unwrapped_models)
    optimizer = optimizer_state.sharded_state(run.optimizer, model, loading=loading)
    return {"model": model, "optimizer": optimizer, "schedule": run.schedule.state_dict()}


def restore(run: "Run", resume: ResumePoint) -> None:
    """Resume from a checkpoint, or load the weights that the recipe starts from. Collective."""
    # Checkpoints of adapters leave out the weights beside them. A run that is taken back has them.
    needs_base = run.recipe.lora.rank > 0 and not run.base_stamp
    stamp = base.BaseStamp() if needs_base else None
    if run.recipe.checkpoint.load and (needs_base or resume.checkpoint is None):
        _start_from(run, store.find_checkpoint(run.recipe.checkpoint.load), stamp)
    elif stamp is not None:
        _add_initial_weights(run, stamp)
    if stamp is not None:
        run.base_stamp = stamp.text()
    if resume.checkpoint is not None:
        _resume(run, resume, resume.checkpoint)
    elif run.recipe.lora.load:
        _load_adapters(run, store.find_checkpoint(run.recipe.lora.load))


def _resume(run: "Run", resume: ResumePoint, checkpoint: Path) -> None:
    logger.info("loading %s", checkpoint)
    saved = recipe_from_dict(resume.recipe)
    store.check_model(checkpoint, saved=saved.model, model=run.recipe.model)
    check_parts(saved, run.recipe)
    if run.recipe.lora.rank:
        path = run.recipe.checkpoint.load
        base.check_base(checkpoint, resume.base, stamp=run.base_stamp, path=path)
    on_progress = partial(run.enter, "restoring")
    state = store.load_state(checkpoint, _state(run, loading=True), on_progress=on_progress)
    on_progress()
    store.set_model_state(run.unwrapped_models, state["model"])
    try:
        optimizer_state.load(
            run.optimizer, run.chunks, state["optimizer"], saved=saved, recipe=run.recipe
        )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    # megatron-core adds the steps of the state to those that are done.
    run.schedule.num_steps = 0
    run.schedule.load_state_dict(state["schedule"])
    run.guard.load(resume.numerics)
    run.step = resume.step
    for model in run.unwrapped_models:
        model.set_passes(resume.step * run.microbatches)
    run.consumed_packs = resume.consumed_packs
    run.ledger = Ledger(Damage(**damage) for damage in resume.damaged)
    logger.info("resumed from %s after step %d, pack %d", checkpoint, run.step, run.consumed_packs)
    if changes := list(changed_fields(resume.recipe, dataclasses.asdict(run.recipe))):
        logger.info("resumed with changes: %s", "; ".join(changes))


def _load_adapters(run: "Run", checkpoint: Path) -> None:
    logger.info("loading adapters of %s", checkpoint)
    manifest = store.read_manifest(checkpoint)
    known = base.base_of(checkpoint, manifest)
    saved = recipe_from_dict(manifest["recipe"])
    store.check_model(checkpoint, saved=saved.model, model=run.recipe.model)
    base.check_adapters(checkpoint, saved=saved, recipe=run.recipe)
    # Adapters of other programs have none.
    if known.get("stamp"):
        base.check_base(checkpoint, known, stamp=run.base_stamp, path=run.recipe.checkpoint.load)
    store.load_adapters(run.unwrapped_models, checkpoint, saved=saved)
    run.optimizer.reload_model_params()


def _add_initial_weights(run: "Run", stamp: base.BaseStamp) -> None:
    """Add the initial weights of a base to its stamp."""
    stamp.add(base.base_state(store.model_state(run.unwrapped_models)))
    for model in run.unwrapped_models:
        for part in model.initialize_quantized(run.recipe.training.seed):
            stamp.add(part)


def _start_from(run: "Run", checkpoint: Path, stamp: base.BaseStamp | None) -> None:
    """Load weights, and add those of a base to its stamp."""
    logger.info("loading weights of %s", checkpoint)
    saved = store.recipe_of(checkpoint)
    # A stage of longer packs raises the base. Not so beside adapters, which are served and merged
    # with the weights as they were.
    may_differ = store.ROTARY
    if run.recipe.lora.rank:
        may_differ = ()
    store.check_model(checkpoint, saved=saved.model, model=run.recipe.model, may_differ=may_differ)
    check_rotary(checkpoint, saved, run.recipe)
    if changes := list(_rotary_changes(saved, run.recipe)):
        logger.info("positions other than in %s: %s", checkpoint, "; ".join(changes))
    on_part = None if stamp is None else stamp.add
    store.load_weights(run.unwrapped_models, checkpoint, with_adapters=False, on_part=on_part)
    # Its fp32 copies were made of the initial weights.
    run.optimizer.reload_model_params()
    logger.info("weights from %s", checkpoint)


def check_rotary(checkpoint: Path, saved: Recipe, recipe: Recipe) -> None:
    """Check that positions were not lost: a field that is left out has its default again.

    Raises:
        CheckpointError: the base is smaller, or a scaling is gone or smaller.
    """
    before = saved.model.language
    now = recipe.model.language
    lost = ""
    if now.rotary_base < before.rotary_base:
        lost = f"rotary_base is {now.rotary_base:g}, but {before.rotary_base:g}"
    elif now.rope_scaling.factor < before.rope_scaling.factor:
        factors = (now.rope_scaling.factor, before.rope_scaling.factor)
        lost = "rope_scaling.factor is {:g}, but {:g}".format(*factors)
    elif now.rope_scaling.kind == "none" != before.rope_scaling.kind:
        lost = f"rope_scaling.kind is none, but {before.rope_scaling.kind}"
    if lost:
        raise CheckpointError(
            f"model.language.{lost} in the recipe of {checkpoint}: its weights know no other "
            "positions; they may be stretched, not shrunk: set it to that or more"
        )


def _rotary_changes(saved: Recipe, recipe: Recipe) -> Iterator[str]:
    """Yield a phrase for each field of the rotary embedding that differs."""
    before = dataclasses.asdict(saved.model.language)
    now = dataclasses.asdict(recipe.model.language)
    for name in ("rotary_base", "rope_scaling"):
        yield from changed_fields({name: before[name]}, {name: now[name]}, "model.language")
