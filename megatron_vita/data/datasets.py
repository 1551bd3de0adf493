"""Training or validation data of a recipe: its shards and indexes, plan and stream."""

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_vita.config import DatasetConfig, Recipe
from megatron_vita.costs.flops import forward_weights
from megatron_vita.data.planning.plan import FORMAT_VERSION, read_plan
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.shards.index import IndexHeader, find_index, text_stamp
from megatron_vita.data.shards.storage import Location, find_files, is_remote
from megatron_vita.errors import ConfigError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_vita.data.loading.stream import PackStream

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


def open_split(
    recipe: Recipe, *, split: Split, tokenizer: Tokenizer, tile_share: tuple[int, int] | None
) -> "PackStream":
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
    # Imported here: commands that only find shards and plans need not wait for torch.
    from megatron_vita.data.loading.stream import PackStream

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


def plan_path(recipe: Recipe, split: Split) -> Path:
    """Path of a split's plan file; raises ConfigError if the recipe names no plan folder."""
    if not recipe.data.plan:
        raise ConfigError(
            "data.plan is empty: name the folder that `python -m data_tools plan RECIPE` writes"
        )
    return Path(recipe.data.plan) / f"{split}.arrow"


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
            f"dataset {dataset.name}: {dataset.shards} finds no shards; make them: python -m "
            "data_tools shard"
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
    if split == "train":
        stamp |= {"data.seed": data.seed, "data.epochs": data.epochs}
    return stamp


def _source_stamp(source: Source) -> dict[str, Any]:
    settings = {name: getattr(source.config, name) for name in ("name", "ratio", "cap", *LIMITS)}
    return {**settings, "shards": source.contents}
