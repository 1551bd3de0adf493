"""Indexes beside shards."""

from pathlib import Path

from megatron_vita.data.shards.index import index_path, text_stamp, write_index
from megatron_vita.data.shards.index_build import build_index
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer_base import Tokenizer


def index_shard(shard: Path, tokenizer: Tokenizer) -> Path:
    """Write the index of a shard as a recipe with nothing but a tokenizer has it."""
    chat = ChatFormat(tokenizer)
    path = index_path(shard, text_stamp(chat))
    write_index(build_index(shard, chat), path)
    return path


def index_of(shard: Path) -> Path:
    """The one index beside a shard, whatever tokenizer it was made with."""
    (path,) = shard.parent.glob(f"{shard.name.removesuffix('.tar')}.*index.parquet")
    return path
