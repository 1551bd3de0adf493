"""Return of a run to an earlier step, from which it goes on without the packs since then."""

import logging
from pathlib import Path

from megatron_vita.checkpoint.saver import by_first
from megatron_vita.checkpoint.store import set_latest
from megatron_vita.errors import VitaError
from megatron_vita.training.resume import ResumePoint
from megatron_vita.training.run import Run
from megatron_vita.training.run_state import finish_param_gather, restore_newest
from megatron_vita.training.skipped import SkippedRange, write_skipped

logger = logging.getLogger(__name__)


def roll_back(run: Run) -> None:
    """Restore the newest whole checkpoint from which the run comes to the state of
    `numerics.rollback_steps` steps ago; from there on it leaves out the packs since. Collective.

    `run` stands before the faulty step. A checkpoint may be of an earlier step than that: the steps
    in between are done again, with the same packs.

    Raises:
        VitaError: on all ranks, if there is no such checkpoint, or the plan has too few packs.
    """
    faulty = run.step + 1
    target = faulty - run.recipe.numerics.rollback_steps
    folder = Path(run.recipe.checkpoint.save)
    resume = ResumePoint.find_in(folder, up_to=target)
    if resume.checkpoint is None:
        raise VitaError(
            f"step {faulty}: {folder} has no checkpoint of step {max(target, 0)} or before to roll back to: "
            "raise checkpoint.keep, or lower checkpoint.save_interval or numerics.rollback_steps"
        )
    skipped = _range_to_skip(run, resume, target=target)
    by_first(lambda: _note(run, folder, skipped))
    run.skipped.add(skipped)
    finish_param_gather(run)
    resume = restore_newest(run, resume, up_to=target)
    checkpoint = resume.checkpoint
    assert checkpoint is not None
    # Later ones are of the steps that are taken back.
    by_first(lambda: set_latest(checkpoint))
    logger.info(
        "rolled back to step %d; packs %d to %d are left out after step %d",
        run.step,
        skipped.start + 1,
        skipped.stop,
        target,
    )


def _range_to_skip(run: Run, resume: ResumePoint, *, target: int) -> SkippedRange:
    training = run.recipe.training
    size = training.global_batch_size
    start = run.skipped.consumed_after(resume.consumed_packs, steps=target - resume.step, size=size)
    stop = run.next_pack + size
    assert run.train_stream is not None
    needed = stop + (training.train_iters - target) * size
    available = run.train_stream.plan.num_packs
    if needed > available:
        raise VitaError(
            f"step {run.step + 1}: without packs {start + 1} to {stop}, which a rollback leaves out, "
            f"training.train_iters {training.train_iters} needs {needed} packs, but the plan "
            f"{run.recipe.data.plan} holds {available}: raise data.epochs, plan again and resume"
        )
    return SkippedRange(step=run.step + 1, start=start, stop=stop)


def _note(run: Run, folder: Path, skipped: SkippedRange) -> None:
    if run.claim is not None:
        run.claim.check()
    write_skipped(folder, skipped)
