"""Datasets of a recipe: their shards, indexes and the encoder of their samples."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from megatron_vita.config import DatasetConfig, Recipe
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.shards.index import IndexHeader, find_index, text_stamp
from megatron_vita.data.shards.storage import Location, find_files, is_remote
from megatron_vita.errors import ConfigError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer_base import Tokenizer

Split = Literal["train", "validation"]
REQUESTS = 16  # concurrent requests to an object store
LIMITS = ("max_tiles", "max_frames", "max_fps")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Shards of a dataset, sorted by name, with their indexes and the headers of these."""

    config: DatasetConfig
    shards: list[Location]
    indexes: list[Location]
    headers: list[IndexHeader]

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.config.name

    @property
    def contents(self) -> dict[str, str]:
        """Index fingerprints by name of the shard."""
        return {
            shard.name: header.fingerprint
            for shard, header in zip(self.shards, self.headers, strict=True)
        }

    @property
    def ratio(self) -> float:
        """Fraction of the samples in an epoch; above 1, samples are repeated."""
        return self.config.ratio

    @property
    def cap(self) -> int:
        """Maximum number of samples in an epoch; 0: no limit."""
        return self.config.cap


def sample_encoder(
    recipe: Recipe, tokenizer: Tokenizer, *, dataset: DatasetConfig | None = None
) -> SampleEncoder:
    """Build the encoder of a recipe's samples, with the limits of `dataset` if it has its own."""
    own = {}
    # Without a dataset nothing is truncated: prompts in serving have their own limit.
    limit = 0
    if dataset is not None:
        own = {name: getattr(dataset, name) for name in LIMITS if getattr(dataset, name)}
        limit = recipe.data.seq_length
    return SampleEncoder(
        chat=ChatFormat(tokenizer, recipe.text),
        media=dataclasses.replace(recipe.media, **own),
        vision=recipe.model.vision,
        text_only=recipe.model.text_only,
        limit=limit,
        overlong=recipe.data.overlong,
        alignment=recipe.data.padding_multiple,
    )


def find_sources(recipe: Recipe, split: Split, *, tokenizer: Tokenizer) -> list[Source]:
    """Find the datasets of a split with their shards, reading only the footers of indexes.

    Raises:
        ConfigError: there is no dataset, or a glob matches no shard.
        DataError: an index is missing, or of another tokenizer or template.
    """
    datasets: list[DatasetConfig] = getattr(recipe.data, split)
    if not datasets:
        raise ConfigError(f"data.{split} is empty: name at least one dataset")
    text = text_stamp(ChatFormat(tokenizer, recipe.text))
    sources = []
    for dataset in datasets:
        shards = find_shards(dataset)
        threads = 1
        if is_remote(shards[0]):
            threads = REQUESTS
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda shard: find_index(shard, text), shards))
        indexes = [path for path, _ in found]
        headers = [header for _, header in found]
        sources.append(Source(config=dataset, shards=shards, indexes=indexes, headers=headers))
    return sources


def find_shards(dataset: DatasetConfig) -> list[Location]:
    """Find a dataset's shards, sorted by name.

    Raises:
        ConfigError: the glob matches no shard, two shards of one name, or another file.
    """
    # By name, not by path: plans number shards in this order, wherever the files lie.
    paths = sorted(find_files(dataset.shards), key=lambda path: path.name)
    if not paths:
        raise ConfigError(
            f"dataset {dataset.name}: {dataset.shards} finds no shards; make them: vita data shard"
        )
    names = [path.name for path in paths]
    # Plans and ledgers know a shard by its file name alone.
    for path, following in itertools.pairwise(paths):
        if path.name == following.name:
            raise ConfigError(
                f"dataset {dataset.name}: two shards are called {path.name}: {path} and {following}"
            )
    if wrong := [name for name in names if not name.endswith(".tar")]:
        raise ConfigError(
            f"dataset {dataset.name}: {dataset.shards} finds {wrong[0]}, which is not a .tar shard"
        )
    return paths
