"""Shards that recipes with different tokenizers share: each has an index of its own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.planning import index_shards
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.text.vocabulary import open_tokenizer
from tests.data_tools.toy_jsonl import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and two tokenizers of their text."""
    root = tmp_path_factory.mktemp("shared")
    path = write_world(root)
    for name, size in (("toy", "320"), ("other", "312")):
        assert (
            main(["tokenizer", str(path), "--out", f"{root}/{name}.model", "--vocab-size", size])
            == 0
        )
    arguments = ["--media", f"{root}/media", "--out", f"{root}/toy", "--workers", "0"]
    assert main(["shard", str(path), "--samples-per-shard", "4", *arguments]) == 0
    return root


def recipe(world: Path, tokenizer: str = "toy") -> Recipe:
    overrides = [f"text.tokenizer={world}/{tokenizer}.model", f"data.plan={world}/plan_{tokenizer}"]
    return load_recipe(world / "recipe.yaml", overrides)


def opened(recipe: Recipe) -> PackStream:
    return open_split(recipe, split="train", tokenizer=open_tokenizer(recipe), tile_share=(0, 1))


def run(command: str, world: Path, tokenizer: str = "toy") -> None:
    overrides = [f"text.tokenizer={world}/{tokenizer}.model", f"data.plan={world}/plan_{tokenizer}"]
    options = ["--workers", "0"] if command == "index" else []
    assert main([command, f"{world}/recipe.yaml", *overrides, *options]) == 0


def indexes(world: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (world / "toy").glob("*.index.parquet")}


def test_an_index_for_another_tokenizer_leaves_a_run_its_own(world: Path) -> None:
    run("index", world)
    run("plan", world)
    mine = indexes(world)
    stream = opened(recipe(world))
    first = [stream[pack].input_ids.tolist() for pack in range(len(stream))]
    fresh = opened(recipe(world))  # has read no index yet
    run("index", world, "other")
    run("plan", world, "other")
    assert mine.items() < indexes(world).items()
    assert len(indexes(world)) == 2 * len(mine)
    assert [fresh[pack].input_ids.tolist() for pack in range(len(fresh))] == first
    assert len(opened(recipe(world, "other"))) > 0


def test_recipes_index_the_same_shards_at_once(world: Path) -> None:
    for path in (world / "toy").glob("*.index.parquet"):
        path.unlink()
    recipes = [recipe(world, name) for name in ("toy", "other", "toy", "other")]
    with ThreadPoolExecutor(len(recipes)) as pool:
        list(pool.map(index_shards, recipes))
    assert len(indexes(world)) == 6
    assert not list((world / "toy").glob("*.partial"))
    again = [index_shards(each) for each in recipes[:2]]
    assert [(count.written, count.current) for count in again] == [(0, 3), (0, 3)]
