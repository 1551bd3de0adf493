"""A recipe's training or validation data: its shards and indexes, its plan, its stream."""

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
from megatron_vita.data.shards.index import IndexHeader, index_path, read_header, text_stamp
from megatron_vita.data.shards.storage import Location, find_files, is_remote
from megatron_vita.errors import ConfigError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_vita.data.loading.stream import PackStream

Split = Literal["train", "validation"]
REQUESTS = 16  # to an object store at a time
LIMITS = ("max_tiles", "max_frames", "max_fps")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset's shards, in the order of their names, with the headers of their indexes."""

    config: DatasetConfig
    shards: list[Location]
    headers: list[IndexHeader]

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.config.name

    @property
    def contents(self) -> dict[str, str]:
        """The shards' names, with the fingerprints of their indexes."""
        return {
            shard.name: header.fingerprint
            for shard, header in zip(self.shards, self.headers, strict=True)
        }

    @property
    def ratio(self) -> float:
        """Share of its samples that an epoch takes."""
        return self.config.ratio

    @property
    def cap(self) -> int:
        """Most samples that an epoch takes; 0: no limit."""
        return self.config.cap


def open_split(
    recipe: Recipe, *, split: Split, tokenizer: Tokenizer, tile_share: tuple[int, int] | None
) -> "PackStream":
    """The packs of a recipe's training or validation data, as its plan has them.

    `tile_share` is (rank, ranks) of the ranks that share a pack's tiles, None for ranks that need
    none. Raises ConfigError if the recipe names no data or plan, DataError if shards, indexes or
    plan are missing or do not fit the recipe; both say what to run.
    """
    # here, since commands that find shards and plans alone need not wait for torch
    from megatron_vita.data.loading.stream import PackStream

    path = plan_path(recipe, split)
    sources = find_sources(recipe, split, tokenizer=tokenizer)
    plan = read_plan(path, plan_stamp(recipe, split, tokenizer=tokenizer, sources=sources))
    return PackStream(
        plan,
        shards=[source.shards for source in sources],
        contents=[list(source.contents.values()) for source in sources],
        data=recipe.data,
        encoders=[sample_encoder(recipe, tokenizer, dataset=source.config) for source in sources],
        tile_share=tile_share,
    )


def plan_path(recipe: Recipe, split: Split) -> Path:
    """The plan file of a split. ConfigError if the recipe names no plan folder."""
    if not recipe.data.plan:
        raise ConfigError(
            "data.plan is empty: name the folder that `python -m data_tools plan RECIPE` writes"
        )
    return Path(recipe.data.plan) / f"{split}.arrow"


def sample_encoder(
    recipe: Recipe, tokenizer: Tokenizer, *, dataset: DatasetConfig | None = None
) -> SampleEncoder:
    """What a recipe says about turning samples into documents; those of `dataset`, which may have
    limits of its own."""
    if dataset is None:
        own = {}
    else:
        own = {name: getattr(dataset, name) for name in LIMITS if getattr(dataset, name)}
    return SampleEncoder(
        chat=ChatFormat(tokenizer, recipe.text),
        media=dataclasses.replace(recipe.media, **own),
        vision=recipe.model.vision,
        text_only=recipe.model.text_only,
        limit=recipe.data.seq_length if dataset is not None else 0,
        overlong=recipe.data.overlong,
    )


def find_sources(recipe: Recipe, split: Split, *, tokenizer: Tokenizer) -> list[Source]:
    """The datasets of a split with their shards. Reads footers of indexes only, of remote ones many
    at a time.

    ConfigError if there is no dataset or a glob finds no shard; DataError if an index is missing or
    of another tokenizer or template.
    """
    datasets: list[DatasetConfig] = getattr(recipe.data, split)
    if not datasets:
        raise ConfigError(f"data.{split} is empty: name at least one dataset")
    text = text_stamp(ChatFormat(tokenizer, recipe.text))
    sources = []
    for dataset in datasets:
        shards = find_shards(dataset)
        with ThreadPoolExecutor(REQUESTS if is_remote(shards[0]) else 1) as pool:
            headers = list(pool.map(lambda shard: read_header(index_path(shard), text), shards))
        sources.append(Source(config=dataset, shards=shards, headers=headers))
    return sources


def find_shards(dataset: DatasetConfig) -> list[Location]:
    """A dataset's shards, sorted by name. ConfigError if its glob finds none or finds two of one
    name."""
    paths = sorted(find_files(dataset.shards), key=lambda path: path.name)
    if not paths:
        raise ConfigError(
            f"dataset {dataset.name}: {dataset.shards} finds no shards; make them: python -m data_tools shard"
        )
    names = [path.name for path in paths]
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
    """Every input that a split's plan is a function of, by the recipe's own field names."""
    data = recipe.data
    media = recipe.media
    vision = recipe.model.vision
    text = text_stamp(ChatFormat(tokenizer, recipe.text))
    stamp = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "data.seq_length": data.seq_length,
        "data.document_alignment": data.document_alignment,
        "data.isolate_documents": data.isolate_documents,
        "data.shuffle_window": data.shuffle_window,
        "data.overlong": data.overlong,
        "data.packing_scope": data.packing_scope,
        "training.global_batch_size": recipe.training.global_batch_size
        if data.group_by_cost
        else "any",
        "data.group_by_cost (FLOPs)": list(forward_weights(recipe))
        if data.group_by_cost
        else "none",
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
