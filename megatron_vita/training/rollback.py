"""Return of a run to an earlier step, from which it goes on without the packs since then."""

import logging
from pathlib import Path

from megatron_vita.checkpoint.retention import hide, is_saved
from megatron_vita.checkpoint.saver import by_first, set_latest
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.files import sync
from megatron_vita.training.run.resume import ResumePoint, check_length
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_state import finish_param_gather, restore_newest
from megatron_vita.training.run.skipped import SkippedPacks, SkippedRange, write_skipped

logger = logging.getLogger(__name__)


def take_back(run: Run) -> ResumePoint:
    """Set the run's folder back by `numerics.rollback_steps` steps, without the packs since then.
    Collective.

    `run` stands before the faulty step. A run that ends from here on, by a kill too, resumes as one
    that was rolled back.

    Returns:
        The newest whole checkpoint from which the run comes to that step. It may be of an earlier
        one: the steps in between are done again, with the same packs.

    Raises:
        VitaError: on all ranks, if there is no such checkpoint, the batch size has changed since,
            or the plan has too few packs.
    """
    run.enter("restoring")
    target = _target(run)
    folder = Path(run.recipe.checkpoint.save)
    resume = ResumePoint.find_in(folder, up_to=target)
    if resume.checkpoint is None:
        raise VitaError(
            f"step {run.step + 1}: {folder} has no checkpoint of step {max(target, 0)} or before to roll back to: "
            "raise checkpoint.keep, or lower checkpoint.save_interval or numerics.rollback_steps"
        )
    checkpoint = resume.checkpoint
    skipped = _range_to_skip(run, resume, target=target)
    by_first(lambda: _note(run, checkpoint, skipped))
    run.skipped.add(skipped)
    logger.info(
        "packs %d to %d are left out after step %d", skipped.start + 1, skipped.stop, target
    )
    return resume


def restore(run: Run, resume: ResumePoint) -> None:
    """Restore what `take_back` has found, or the newest whole checkpoint before it. Collective.

    Raises:
        ConfigError: the plan is too short from the earlier one on.
    """
    finish_param_gather(run)
    restored = restore_newest(run, resume, up_to=_target(run))
    checkpoint = restored.checkpoint
    assert checkpoint is not None
    if restored is not resume:
        by_first(lambda: _set_back(run, checkpoint))
        assert run.train_stream is not None
        plan = run.train_stream.plan
        check_length(plan, recipe=run.recipe, resume=restored, skipped=run.skipped)
    # Of steps that are done again, or never counted.
    run.recorded.reduce()
    logger.info("rolled back to step %d", run.step)


def _target(run: Run) -> int:
    return run.step + 1 - run.recipe.numerics.rollback_steps


def _range_to_skip(run: Run, resume: ResumePoint, *, target: int) -> SkippedRange:
    size = run.recipe.training.global_batch_size
    saved = resume.recipe["training"]["global_batch_size"]
    if saved != size:
        raise VitaError(
            f"step {run.step + 1}: training.global_batch_size is {size}, but {saved} in {resume.checkpoint}, which "
            "a rollback would return to: the steps since then cannot be done again; resume from it with "
            f"global_batch_size {saved}, or lower checkpoint.save_interval or numerics.rollback_steps"
        )
    start = run.skipped.consumed_after(resume.consumed_packs, steps=target - resume.step, size=size)
    skipped = SkippedRange(step=run.step + 1, start=start, stop=run.next_pack + size)
    planned = SkippedPacks([*run.skipped, skipped])
    assert run.train_stream is not None
    try:
        check_length(run.train_stream.plan, recipe=run.recipe, resume=resume, skipped=planned)
    except ConfigError as error:
        raise VitaError(
            f"step {run.step + 1}: a rollback would leave out packs {start + 1} to {skipped.stop}: {error}"
        ) from error
    return skipped


def _note(run: Run, checkpoint: Path, skipped: SkippedRange) -> None:
    """Set the folder back, and note what is left out, on the first rank.

    The note last: a kill before it leaves a run that does all steps since again, and decides anew.
    """
    _set_back(run, checkpoint)
    write_skipped(checkpoint.parent, skipped)


def _set_back(run: Run, checkpoint: Path) -> None:
    """Make a checkpoint the latest, and hide the later ones, of steps that are taken back.

    Not deleted yet: its tensors are read, and found whole, after this.
    """
    if run.claim is not None:
        run.claim.check()
    set_latest(checkpoint)
    folder = checkpoint.parent
    for path in [path for path in folder.iterdir() if is_saved(path)]:
        if path.name > checkpoint.name:
            hide(path)
    sync(folder)
