"""A recipe's training and held-out packs, and which replica takes which of a step's."""

from megatron_vita.config import Recipe
from megatron_vita.data.plan import PackPlan
from megatron_vita.data.split import open_split
from megatron_vita.data.stream import PackStream
from megatron_vita.errors import ConfigError
from megatron_vita.layout.dealing import deal_packs
from megatron_vita.planning.flops import variable_cost
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.training.position import check_plan, find_position


def open_streams(recipe: Recipe, *, tile_share: tuple[int, int] | None) -> tuple[PackStream, PackStream | None]:
    """Training packs, and held-out ones where the recipe validates; `tile_share` as `PackStream` takes it.

    ConfigError if the tokenizer does not fit the model or the plan is too short; CheckpointError if the run to be
    resumed has consumed other packs than the plan has; DataError as `open_split` raises it.
    """
    tokenizer = load_tokenizer(recipe.text.tokenizer)
    if tokenizer.vocab_size > recipe.model.language.vocab_size:
        raise ConfigError(
            f"model.language.vocab_size is {recipe.model.language.vocab_size}, but the tokenizer "
            f"{recipe.text.tokenizer} has {tokenizer.vocab_size} entries"
        )
    train = open_split(recipe, split="train", tokenizer=tokenizer, tile_share=tile_share)
    check_plan(train.plan, recipe, find_position(recipe))
    if not recipe.training.eval_interval:
        return train, None
    return train, open_split(recipe, split="validation", tokenizer=tokenizer, tile_share=tile_share)


def pack_costs(recipe: Recipe, plan: PackPlan, *, first: int) -> list[int]:
    """What each pack of a step costs beyond what all cost, by `variable_cost`; `first` is the step's first pack."""
    packs = range(first, first + recipe.training.global_batch_size)
    return [variable_cost(recipe, plan.lengths_of(pack), tiles=plan.tiles_of(pack)) for pack in packs]


def packs_of_replicas(recipe: Recipe, plan: PackPlan, *, first: int, replicas: int) -> list[list[int]]:
    """The packs of a step that each replica takes, of nearly equal cost; `first` is the step's first pack."""
    hands = deal_packs(pack_costs(recipe, plan, first=first), replicas)
    return [[first + pack for pack in hand] for hand in hands]
