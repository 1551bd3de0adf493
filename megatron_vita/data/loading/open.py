"""Entry to the planned packs of a recipe."""

from megatron_vita.config import Recipe
from megatron_vita.data.datasets import Split, find_sources, sample_encoder
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import read_plan
from megatron_vita.data.planning.stamp import plan_path, plan_stamp
from megatron_vita.text.tokenizer_base import Tokenizer


def open_split(
    recipe: Recipe, *, split: Split, tokenizer: Tokenizer, tile_share: tuple[int, int] | None
) -> PackStream:
    """Open the planned packs of a recipe's training or validation data.

    Args:
        recipe: the recipe.
        split: "train" or "validation".
        tokenizer: the recipe's tokenizer.
        tile_share: (rank, ranks) among the ranks that share a pack's tiles; None: decode none.

    Raises:
        ConfigError: the recipe names no data or no plan.
        DataError: shards, indexes or the plan are missing or do not match the recipe.
    """
    path = plan_path(recipe, split)
    sources = find_sources(recipe, split, tokenizer=tokenizer)
    plan = read_plan(path, plan_stamp(recipe, split, tokenizer=tokenizer, sources=sources))
    return PackStream(
        plan,
        shards=[source.shards for source in sources],
        indexes=[source.indexes for source in sources],
        contents=[list(source.contents.values()) for source in sources],
        data=recipe.data,
        encoders=[sample_encoder(recipe, tokenizer, dataset=source.config) for source in sources],
        tile_share=tile_share,
    )
