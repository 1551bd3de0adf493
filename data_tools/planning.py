"""Indexes and plans of a recipe."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from megatron_vita.config import Recipe
from megatron_vita.data.index import index_path, read_header, text_stamp, write_index
from megatron_vita.data.index_build import build_index
from megatron_vita.data.plan import PackPlan, read_plan, write_plan
from megatron_vita.data.planner import Continuation, Rejected, make_plan
from megatron_vita.data.split import Split, find_shards, plan_path
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.tokenizer import Tokenizer, load_tokenizer

REJECTED = "rejected.jsonl"


def load_recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer. ConfigError if it names none."""
    if not recipe.text.tokenizer:
        raise ConfigError("text.tokenizer is empty: name a tokenizer folder or a SentencePiece .model file")
    return load_tokenizer(recipe.text.tokenizer)


def index_shards(recipe: Recipe) -> tuple[int, int]:
    """Indexes the shards of all datasets; gives how many indexes were written and how many were current."""
    tokenizer = load_recipe_tokenizer(recipe)
    datasets = [*recipe.data.train, *recipe.data.validation]
    if not datasets:
        raise ConfigError("data.train is empty: name at least one dataset")
    shards = list(dict.fromkeys(path for dataset in datasets for path in find_shards(dataset)))
    text = text_stamp(tokenizer, recipe.text.template)
    stale = [shard for shard in shards if not _is_current(shard, text)]
    for shard in tqdm(stale, desc="index", unit=" shards", disable=not stale):
        write_index(build_index(shard, tokenizer, recipe.text.template), index_path(shard))
    return len(stale), len(shards) - len(stale)


def write_plans(recipe: Recipe, *, strict: bool, continue_from: int = 0) -> Iterator[str]:
    """Writes the plan of each split that has datasets, and `rejected.jsonl` beside them. Yields a line about each.

    `continue_from` keeps the packs before it of the training plan that is there.
    """
    tokenizer = load_recipe_tokenizer(recipe)
    rejected: list[Rejected] = []
    for split in get_args(Split):
        if split == "train" or getattr(recipe.data, split):
            path = plan_path(recipe, split)
            continued = Continuation(read_plan(path), continue_from) if continue_from and split == "train" else None
            plan, left_out = make_plan(recipe, split, tokenizer=tokenizer, strict=strict, continued=continued)
            write_plan(plan, path)
            rejected += left_out
            yield _summary(path, plan, recipe, len(left_out))
    path = Path(recipe.data.plan) / REJECTED
    path.write_text("".join(json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in rejected))
    if rejected:
        yield f"{len(rejected)} samples that cannot be used, listed in {path}"


def _summary(path: Path, plan: PackPlan, recipe: Recipe, rejected: int) -> str:
    filled = plan.num_tokens / (plan.num_packs * recipe.data.seq_length)
    return (
        f"{path}: {plan.num_packs} packs of {recipe.data.seq_length} tokens, {plan.num_documents} documents, "
        f"{filled:.1%} filled, {rejected} samples rejected"
    )


def _is_current(shard: Path, text: dict[str, str]) -> bool:
    path = index_path(shard)
    try:
        header = read_header(path, text)
    except DataError:
        return False
    status = shard.stat()
    return header.shard_size == status.st_size and path.stat().st_mtime_ns >= status.st_mtime_ns
