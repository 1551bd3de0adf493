"""Training and held-out packs of a recipe, and their division among replicas."""

from megatron_vita.config import Recipe
from megatron_vita.costs.flops import variable_cost
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import PackPlan
from megatron_vita.errors import ConfigError
from megatron_vita.layout.assignment import assign_packs
from megatron_vita.text.vocabulary import open_tokenizer
from megatron_vita.training.run.resume import ResumePoint, check_plan
from megatron_vita.training.run.skipped import SkippedPacks


def open_streams(
    recipe: Recipe,
    *,
    resume: ResumePoint,
    skipped: SkippedPacks,
    tile_share: tuple[int, int] | None,
    replicas: int,
) -> tuple[PackStream, PackStream | None]:
    """Open the training packs, and the held-out ones if the recipe validates.

    Args:
        recipe: a checked recipe.
        resume: position of the run, which the plan must continue.
        skipped: packs that the run leaves out.
        tile_share: tile rank and number of tile ranks, for `PackStream`.
        replicas: data-parallel replicas.

    Raises:
        ConfigError: the tokenizer does not fit the model, or a plan is too short.
        CheckpointError: the run to be resumed has consumed other packs than the plan's.
        DataError: as `open_split`.
    """
    tokenizer = open_tokenizer(recipe)
    train = open_split(recipe, split="train", tokenizer=tokenizer, tile_share=tile_share)
    check_plan(train.plan, recipe=recipe, resume=resume, skipped=skipped)
    if not recipe.training.eval_interval:
        return train, None
    held_out = open_split(recipe, split="validation", tokenizer=tokenizer, tile_share=tile_share)
    if not packs_of_validation(recipe, len(held_out), replicas=replicas):
        raise ConfigError(
            f"the plan of data.validation holds {len(held_out)} packs, and a validation takes at most eval_iters "
            f"{recipe.training.eval_iters} x global_batch_size {recipe.training.global_batch_size}: too few for "
            f"each of {replicas} replicas to take {'as many as stages' if recipe.parallel.virtual_size else 'one'}: "
            "hold out more, or set training.eval_interval to 0"
        )
    return train, held_out


def packs_of_validation(recipe: Recipe, held_out: int, *, replicas: int) -> int:
    """Return the number of held-out packs that each replica takes in a validation."""
    wanted = recipe.training.eval_iters * recipe.training.global_batch_size
    count = min(wanted, held_out) // replicas
    # The interleaved schedule of megatron-core needs a multiple of the stages.
    if recipe.parallel.virtual_size is not None:
        count -= count % recipe.parallel.pipeline_model_parallel_size
    return count


def pack_costs(recipe: Recipe, plan: PackPlan, *, first: int) -> list[int]:
    """Return the `variable_cost` of each pack of the step whose first pack is `first`."""
    packs = range(first, first + recipe.training.global_batch_size)
    return [
        variable_cost(recipe, plan.lengths_of(pack), tiles=plan.tiles_of(pack)) for pack in packs
    ]


def packs_of_replicas(
    recipe: Recipe, plan: PackPlan, *, first: int, replicas: int
) -> list[list[int]]:
    """Divide a step's packs among the replicas, at nearly equal cost; `first` is its first pack."""
    assignments = assign_packs(pack_costs(recipe, plan, first=first), replicas)
    return [[first + pack for pack in assigned] for assigned in assignments]
