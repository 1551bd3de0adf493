"""Place of a split's plan, and the stamp that says what it was made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vita.config import Recipe
from megatron_vita.costs.flops import forward_weights
from megatron_vita.data.datasets import LIMITS, Source, Split
from megatron_vita.data.planning.plan import FORMAT_VERSION
from megatron_vita.data.shards.index import text_stamp
from megatron_vita.errors import ConfigError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer_base import Tokenizer


def plan_path(recipe: Recipe, split: Split) -> Path:
    """Path of a split's plan file; raises ConfigError if the recipe names no plan folder."""
    if not recipe.data.plan:
        raise ConfigError("data.plan is empty: name the folder that `vita data plan RECIPE` writes")
    return Path(recipe.data.plan) / f"{split}.arrow"


def plan_stamp(
    recipe: Recipe, split: Split, *, tokenizer: Tokenizer, sources: Sequence[Source]
) -> dict[str, Any]:
    """Collect every input of a split's plan, by the recipe's field names."""
    data = recipe.data
    media = recipe.media
    vision = recipe.model.vision
    text = text_stamp(ChatFormat(tokenizer, recipe.text))
    # Costs of packs depend on the batch and the model only where packs are grouped by them: other
    # plans stay valid if these change.
    batch: int | str = "any"
    costs: list[float] | str = "none"
    if data.group_by_cost:
        batch = recipe.training.global_batch_size
        costs = list(forward_weights(recipe))
    stamp = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "data.seq_length": data.seq_length,
        "data.document_alignment": data.document_alignment,
        "data.isolate_documents": data.isolate_documents,
        "data.shuffle_window": data.shuffle_window,
        "data.overlong": data.overlong,
        "data.packing_scope": data.packing_scope,
        "training.global_batch_size": batch,
        "data.group_by_cost (FLOPs)": costs,
        "model.text_only": recipe.model.text_only,
        "media.tiling": media.tiling,
        "media.grids": media.grids,
        "media.min_tiles": media.min_tiles,
        "media.max_tiles": media.max_tiles,
        "media.max_fps": media.max_fps,
        "media.max_frames": media.max_frames,
        "model.vision.image_size": vision.image_size,
        "model.vision.image_token_length": vision.image_token_length,
        "text": {
            "template": recipe.text.template,
            "media_format": text["media_format"],
            "tokenizer_fingerprint": text["tokenizer"],
            "template_fingerprint": text["template"],
        },
        f"data.{split}": [_source_stamp(source) for source in sources],
    }
    # Plans of recipes without pairs stay valid.
    if recipe.dpo.beta:
        stamp["dpo.beta"] = "any"
    if split == "train":
        stamp |= {"data.seed": data.seed, "data.epochs": data.epochs}
    return stamp


def _source_stamp(source: Source) -> dict[str, Any]:
    settings = {name: getattr(source.config, name) for name in ("name", "ratio", "cap", *LIMITS)}
    return {**settings, "shards": source.contents}
