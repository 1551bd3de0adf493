"""Files of other format versions are refused by name, with the way to files of this one."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_vita.checkpoint.manifest import MANIFEST, read_manifest
from megatron_vita.config import load_recipe
from megatron_vita.data.planning import plan as plans
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.shards import index as indexes
from megatron_vita.errors import CheckpointError, ConfigError, DataError
from tests.data.toy_data import World


def test_a_recipe_of_another_format_is_refused_with_the_format_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("format_version: 2")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: format_version is 2; .* reads 1"):
        load_recipe(path)


@pytest.mark.parametrize("version", [1, 3, None])
def test_a_checkpoint_of_another_format_is_refused_with_the_way_over_hugging_face(
    tmp_path: Path, version: int | None
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": version, "recipe": {}}))
    message = rf"format version {version}; this version reads 2; .*to-hf.*from-hf"
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_an_index_of_another_format_is_refused_with_the_command_that_makes_it_again(
    tmp_path: Path, world: World
) -> None:
    (path, *_) = sorted(world.root.glob("*.index.parquet"))
    index = indexes.read_index(path)
    index.header = dataclasses.replace(index.header, format_version=4)
    old = tmp_path / path.name
    indexes.write_index(index, old)
    with pytest.raises(DataError, match=r"index format 4, .* make it again with vita data index"):
        indexes.read_index(old)


def test_a_plan_of_another_format_is_refused_with_the_command_that_makes_it_again(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans.read_plan(plan_path(world.recipe, "train"))
    with monkeypatch.context() as patch:
        patch.setattr(plans, "FORMAT_VERSION", 2)
        plans.write_plan(plan, tmp_path / "train.arrow")
    message = r"train\.arrow: plan format 2, this version reads 3; .*vita data plan RECIPE"
    with pytest.raises(DataError, match=message):
        plans.read_plan(tmp_path / "train.arrow")
