"""Position of a run by its newest checkpoint, checked against the current recipe and plan."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.base import BASE
from megatron_vita.config import Recipe
from megatron_vita.data.planning.plan import PackPlan
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.training.run.skipped import SkippedPacks

FIXED = (
    "model.text_only",
    "training.bf16",
    "parallel.use_distributed_optimizer",
    "optimizer.vision_lr_mult",
    "optimizer.vision_lr_decay",
    "training.freeze_vision_model",
    "training.freeze_projector",
    "training.freeze_language_model",
    "lora.rank",
    "lora.alpha",
    "lora.rslora",
    "lora.dora",
    "lora.targets",
    "lora.quantize_base",
    "lora.quantize_block_size",
    "lora.double_quant",
)


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Newest checkpoint of a run and the contents of its manifest; the start if there is none."""

    checkpoint: Path | None = None
    step: int = 0
    consumed_packs: int = 0
    plan_digest: str = ""  # of the consumed packs; empty if unknown
    recipe: dict[str, Any] = field(default_factory=dict)  # of the saved run, as plain values
    damaged: list[dict[str, Any]] = field(default_factory=list)  # fields of `Damage`
    numerics: dict[str, Any] = field(default_factory=dict)  # as `Guard.state`
    # Path and stamp of the weights that the checkpoint's adapters belong to.
    base: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, recipe: Recipe, *, damaged: Mapping[str, str] | None = None) -> "ResumePoint":
        """Find the newest whole checkpoint in `checkpoint.save`, as `find_in` does. Collective, if
        there is a process group."""
        if not recipe.checkpoint.save:
            return cls()
        return cls.find_in(Path(recipe.checkpoint.save), damaged=damaged)

    @classmethod
    def find_in(
        cls, folder: Path, *, up_to: int | None = None, damaged: Mapping[str, str] | None = None
    ) -> "ResumePoint":
        """Read the manifest of the newest whole checkpoint in a folder. Collective, if there is a
        process group.

        Args:
            folder: parent of the checkpoints.
            up_to: step of the newest that may be taken; None: any.
            damaged: names of checkpoints known to be damaged, with the reasons.

        Raises:
            CheckpointError: on all ranks, if no checkpoint is whole, or the newest has another
                format version.
        """
        name = store.from_first(
            lambda: _name_of(store.latest_checkpoint(folder, up_to=up_to, damaged=damaged))
        )
        if not name:
            return cls()
        checkpoint = folder / name
        manifest = store.read_manifest(checkpoint)
        return cls(
            checkpoint=checkpoint,
            step=manifest["step"],
            consumed_packs=manifest["consumed_packs"],
            plan_digest=manifest.get("plan_digest", ""),
            recipe=manifest["recipe"],
            damaged=manifest.get("damaged", []),
            numerics=manifest.get("numerics", {}),
            base=manifest.get(BASE, {}),
        )


def _name_of(checkpoint: Path | None) -> str:
    return checkpoint.name if checkpoint else ""


def check_plan(
    plan: PackPlan, *, recipe: Recipe, resume: ResumePoint, skipped: SkippedPacks
) -> None:
    """Check that a plan continues the run at `resume`, which leaves out packs.

    Raises:
        ConfigError: the plan is too short for the remaining steps.
        CheckpointError: its first packs are not those that the run has consumed.
    """
    check_length(plan, recipe=recipe, resume=resume, skipped=skipped)
    consumed = resume.consumed_packs
    # A plan made again with other data begins with other packs; one that was continued does not.
    if resume.plan_digest and plan.digest_before(consumed) != resume.plan_digest:
        raise CheckpointError(
            f"{resume.checkpoint}: the {consumed} packs that this run has consumed are not the first {consumed} of "
            f"the plan {recipe.data.plan}: going on would leave out samples or repeat them. Plan as before, or change "
            f"the mix from there on: vita data plan --continue-from {consumed}; for another run, name another "
            "checkpoint.save"
        )


def check_length(
    plan: PackPlan, *, recipe: Recipe, resume: ResumePoint, skipped: SkippedPacks
) -> None:
    """Check that a plan lasts for the steps of a run after `resume`, which leaves out packs.

    Raises:
        ConfigError: it does not.
    """
    training = recipe.training
    size = training.global_batch_size
    # By packs, not by steps: the batch size may have changed since.
    consumed = resume.consumed_packs
    steps = max(0, training.train_iters - resume.step)
    needed = skipped.consumed_after(consumed, steps=steps, size=size)
    if needed <= plan.num_packs:
        return
    firsts = skipped.firsts(consumed, steps=steps, size=size)
    possible = [first for first in firsts if first + size <= plan.num_packs]
    left_out = ""
    if len(skipped):
        left_out = ", with the packs that rollbacks leave out,"
    raise ConfigError(
        f"training.train_iters {training.train_iters} x global_batch_size {size}{left_out} needs {needed} packs, "
        f"but the plan {recipe.data.plan} holds {plan.num_packs}: raise data.epochs and plan again, or lower "
        f"train_iters to {resume.step + len(possible)}"
    )


def check_parts(saved: Recipe, now: Recipe) -> None:
    """Check the fields (FIXED) that determine the optimizer's parameter groups and state layout, or
    the base that adapters are trained for.

    Raises:
        CheckpointError: one differs from the saved run.
    """
    for name in FIXED:
        then = attrgetter(name)(saved)
        value = attrgetter(name)(now)
        if then != value:
            start = "checkpoint.load"
            if saved.lora.rank:
                start = "lora.load"
            raise CheckpointError(
                f"{name} is {value}, but {then} in the run to be resumed, which it cannot change in; start another "
                f"run from its weights: {start}, and another checkpoint.save"
            )


def changed_fields(then: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """Yield a phrase for each field that differs between two recipes, both as plain values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in now:
            path = name
            if prefix:
                path = f"{prefix}.{name}"
            yield from changed_fields(then.get(name), now[name], path)
    elif then != now:
        yield f"{prefix} {now!r} (was {then!r})"
