"""Position of a run by its newest checkpoint, checked against the current recipe and plan."""

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vita.checkpoint import store
from megatron_vita.config import Recipe
from megatron_vita.data.planning.plan import PackPlan
from megatron_vita.errors import CheckpointError, ConfigError

FIXED = (
    "model.text_only",
    "training.bf16",
    "parallel.use_distributed_optimizer",
    "optimizer.vision_lr_mult",
    "optimizer.vision_lr_decay",
    "training.freeze_vision_model",
    "training.freeze_projector",
    "training.freeze_language_model",
)


class Position(NamedTuple):
    """Steps done and packs consumed; `digest` identifies those packs, empty if unknown."""

    step: int = 0
    consumed_packs: int = 0
    digest: str = ""
    checkpoint: Path | None = None


def find_position(recipe: Recipe) -> Position:
    """Return the position of the newest checkpoint in `checkpoint.save`; the start if there is
    none."""
    newest = store.latest_checkpoint(recipe.checkpoint.save) if recipe.checkpoint.save else None
    if newest is None:
        return Position()
    manifest = store.read_manifest(newest)
    return Position(
        manifest["step"], manifest["consumed_packs"], manifest.get("plan_digest", ""), newest
    )


def check_plan(plan: PackPlan, recipe: Recipe, position: Position) -> None:
    """Check that a plan fits a run's position.

    Raises:
        ConfigError: the plan is too short for the remaining steps.
        CheckpointError: its packs up to the position are not those that the run has consumed.
    """
    training = recipe.training
    consumed = position.consumed_packs
    needed = consumed + max(0, training.train_iters - position.step) * training.global_batch_size
    if needed > plan.num_packs:
        enough = position.step + (plan.num_packs - consumed) // training.global_batch_size
        raise ConfigError(
            f"training.train_iters {training.train_iters} x global_batch_size {training.global_batch_size} needs "
            f"{needed} packs, but the plan {recipe.data.plan} holds {plan.num_packs}: raise data.epochs and plan "
            f"again, or lower train_iters to {max(0, enough)}"
        )
    if position.digest and plan.digest_before(consumed) != position.digest:
        raise CheckpointError(
            f"{position.checkpoint}: the {consumed} packs that this run has consumed are not the first {consumed} of "
            f"the plan {recipe.data.plan}: going on would leave out samples or repeat them. Plan as before, or change "
            f"the mix from there on: data_tools plan --continue-from {consumed}; for another run, name another "
            "checkpoint.save"
        )


def check_parts(saved: Recipe, now: Recipe) -> None:
    """Check the fields that determine the optimizer's parameter groups and state layout (FIXED).

    Raises:
        CheckpointError: one differs from the saved run.
    """
    for field in FIXED:
        then, value = (attrgetter(field)(recipe) for recipe in (saved, now))
        if then != value:
            raise CheckpointError(
                f"{field} is {value}, but {then} in the run to be resumed, which it cannot change in; start another "
                "run from its weights: checkpoint.load"
            )


def changed_fields(then: Any, now: Any, field: str = "") -> Iterator[str]:
    """Yield a phrase for each field that differs between two recipes, both as plain values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in now:
            yield from changed_fields(
                then.get(name), now[name], f"{field}.{name}" if field else name
            )
    elif then != now:
        yield f"{field} {now!r} (was {then!r})"
