"""Indexes and plans of a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args

from data_tools.reading.members import describe_members
from data_tools.workers.pool import IN_PROCESS, SampleGuard, WorkerOptions, run_tasks
from data_tools.workers.progress import progress_bar
from megatron_vita.config import Recipe, TextConfig
from megatron_vita.data.datasets import Split, find_shards
from megatron_vita.data.planning.plan import PackPlan, read_plan, write_plan
from megatron_vita.data.planning.planner import Continuation, Rejected, make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.samples.third_party import read_rule, rule_stamp
from megatron_vita.data.shards.index import find_index, index_path, text_stamp, write_index
from megatron_vita.data.shards.index_build import build_sound_index
from megatron_vita.data.shards.quarantine import (
    quarantine_path,
    read_quarantine,
    write_quarantine,
)
from megatron_vita.data.shards.storage import refuse_remote
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import remove_abandoned, write_json_lines
from megatron_vita.sizes import counted
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.vocabulary import open_tokenizer, tokens_needed

REJECTED = "rejected.jsonl"


class IndexTask(NamedTuple):
    """One shard to index."""

    shard: Path
    text: TextConfig
    text_only: bool
    strict: bool


@dataclass
class IndexCount:
    """Counts of a recipe's shards: indexes written, indexes still current, and samples left out.
    `members` says of other makers' shards what each kind of member became."""

    written: int
    current: int
    left_out: int
    members: list[str]


def index_shards(
    recipe: Recipe, *, options: WorkerOptions = IN_PROCESS, strict: bool = True
) -> IndexCount:
    """Index the shards of all datasets.

    Samples that cannot be read are left out and listed in the quarantine beside the shard.

    Raises:
        DataError: with `strict`: naming shard and key of the first sample that cannot be read.
    """
    tokenizer = open_tokenizer(recipe)
    shards = find_all_shards(recipe)
    text = text_stamp(ChatFormat(tokenizer, recipe.text))
    # A current index is kept, so that a repeated or interrupted command does only what is left.
    stale = [shard for shard in shards if not _is_current(shard, text)]
    tasks = [IndexTask(shard, recipe.text, recipe.model.text_only, strict) for shard in stale]
    with progress_bar("index", total=len(stale), unit="shards") as bar:
        for _ in run_tasks(_index_shard, tasks, options=options):
            bar.update()
    remove_abandoned([index_path(shard, text) for shard in shards])
    remove_abandoned([quarantine_path(shard) for shard in shards])
    left_out = sum(len(read_quarantine(shard).entries) for shard in shards)
    return IndexCount(
        written=len(stale),
        current=len(shards) - len(stale),
        left_out=left_out,
        members=list(describe_members(shards, text)),
    )


def find_all_shards(recipe: Recipe) -> list[Path]:
    """List the shards of all datasets of a recipe, each once."""
    datasets = [*recipe.data.train, *recipe.data.validation]
    if not datasets:
        raise ConfigError("data.train is empty: name at least one dataset")
    shards = dict.fromkeys(path for dataset in datasets for path in find_shards(dataset))
    return [refuse_remote(shard, "indexing and checking") for shard in shards]


def _index_shard(task: IndexTask, guard: SampleGuard) -> None:
    tokenizer = _tokenizer(
        task.text.tokenizer, added=tokens_needed(task.text, text_only=task.text_only)
    )
    chat = ChatFormat(tokenizer, task.text)
    index, quarantine = build_sound_index(task.shard, chat, attempt=guard.run)
    bad = [entry for entry in quarantine.entries if entry.by == "index"]
    if bad and task.strict:
        raise DataError(bad[0].reason)
    # The quarantine first: after a kill in between, the index is still the old one, and stale.
    if quarantine.entries or quarantine_path(task.shard).exists():
        write_quarantine(quarantine, task.shard)
    write_index(index, index_path(task.shard, text_stamp(chat)))


# A worker indexes many shards, and loading a tokenizer takes seconds.
_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


def write_plans(recipe: Recipe, *, strict: bool, continue_from: int = 0) -> Iterator[str]:
    """Write the plan of each split that has datasets, and `rejected.jsonl`; yields a line about
    each.

    `continue_from` keeps that many packs of the existing training plan.
    """
    tokenizer = open_tokenizer(recipe)
    rejected: list[Rejected] = []
    # One list of rejected samples for both splits, which a plan of one alone would replace.
    for split in get_args(Split):
        if split == "train" or getattr(recipe.data, split):
            path = plan_path(recipe, split)
            continued = None
            if continue_from and split == "train":
                continued = Continuation(read_plan(path), continue_from)
            plan, left_out = make_plan(
                recipe, split, tokenizer=tokenizer, strict=strict, continued=continued
            )
            write_plan(plan, path)
            rejected += left_out
            yield _summary(path, plan, recipe, len(left_out))
    path = Path(recipe.data.plan) / REJECTED
    write_json_lines(path, [entry._asdict() for entry in rejected], ensure_ascii=False)
    if rejected:
        yield f"{counted(len(rejected), 'sample')} that cannot be used, listed in {path}"


def _summary(path: Path, plan: PackPlan, recipe: Recipe, rejected: int) -> str:
    filled = plan.num_tokens / (plan.num_packs * recipe.data.seq_length)
    return (
        f"{path}: {counted(plan.num_packs, 'pack')} of {recipe.data.seq_length} tokens, "
        f"{counted(plan.num_documents, 'document')}, {filled:.1%} filled, {counted(rejected, 'sample')} rejected"
    )


def _is_current(shard: Path, text: dict[str, str]) -> bool:
    """Return true if a shard's index is newer than the shard, and of the current rule and
    quarantine."""
    rule = read_rule(shard.parent)
    try:
        path, header = find_index(shard, text)
        age = path.stat().st_mtime_ns
        left_out = read_quarantine(shard).stamp()
    except DataError:
        return False
    # By time and size, not by content: hashing every shard would take as long as indexing it.
    is_of_shard = header.shard_size == shard.stat().st_size and age >= shard.stat().st_mtime_ns
    return is_of_shard and (header.rule, header.left_out) == (rule_stamp(rule), left_out)
