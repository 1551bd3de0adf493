"""`parallel.layout` stands for parallel sizes and memory levers, after bases and before the rest."""

import dataclasses
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_vita.config import Recipe, load_recipe, recipe_from_dict
from megatron_vita.config.named_layouts import known_layouts
from megatron_vita.errors import ConfigError
from megatron_vita.training import dry_report
from megatron_vita.training.metrics.wording import describe_named_layout

BASE = {
    "parallel": {"tensor_model_parallel_size": 8, "sequence_parallel": True},
    "training": {"global_batch_size": 64, "bf16": True, "recompute_granularity": "selective"},
    "data": {"seq_length": 131072},
}
NAME = "7b-stage3-8x80"
TP = "tensor_model_parallel_size"


def recipe_of(folder: Path, *overrides: str, **parallel: object) -> Recipe:
    """A recipe on a base, with its own fields of `parallel` and overrides."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "own.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "parallel": parallel}))
    return load_recipe(folder / "own.yaml", list(overrides))


def fields_of(recipe: Recipe, names: list[str]) -> dict[str, object]:
    return {name: attrgetter(name)(recipe) for name in names}


@pytest.mark.parametrize("way", ["in the file", "as an override"])
def test_a_layout_replaces_all_its_fields_of_the_bases(way: str, tmp_path: Path) -> None:
    if way == "in the file":
        recipe = recipe_of(tmp_path, layout=NAME)
    else:
        recipe = recipe_of(tmp_path, f"parallel.layout={NAME}", tensor_model_parallel_size=4)
    expected = known_layouts()[NAME]
    assert fields_of(recipe, list(expected)) == expected
    assert recipe.parallel.layout == NAME
    assert recipe.training.global_batch_size == 64


def test_own_fields_and_overrides_replace_those_of_a_layout(tmp_path: Path) -> None:
    own = {"layout": NAME, "context_parallel_size": 1}
    recipe = recipe_of(tmp_path, "training.recompute_vision=true", **own)
    assert recipe.parallel.context_parallel_size == 1
    assert recipe.training.recompute_vision
    # wherever the name stands among the overrides
    late = recipe_of(tmp_path, f"parallel.{TP}=1", "parallel.sequence_parallel=false",
                     f"parallel.layout={NAME}")  # fmt: skip
    assert late.parallel.tensor_model_parallel_size == 1


@pytest.mark.parametrize("way", ["as an override", "in a group", "in a later file", "by replaced"])
def test_a_later_layout_leaves_nothing_of_an_earlier_one(way: str, tmp_path: Path) -> None:
    lean, other = "7b-stage2-2x80", "7b-stage2-8x80"
    both = known_layouts()[lean] | known_layouts()[other]
    fresh = fields_of(recipe_of(tmp_path, layout=other), list(both))
    assert any(fresh[name] != value for name, value in known_layouts()[lean].items())
    if way == "as an override":
        recipe = recipe_of(tmp_path, f"parallel.layout={other}", layout=lean)
    elif way == "in a group":
        recipe = recipe_of(tmp_path, f"parallel={{layout: {other}}}", layout=lean)
    elif way == "in a later file":
        recipe_of(tmp_path, layout=lean)
        later = {"base": "own.yaml", "parallel": {"layout": other}}
        (tmp_path / "later.yaml").write_text(yaml.safe_dump(later))
        recipe = load_recipe(tmp_path / "later.yaml")
    else:
        recipe = recipe_of(tmp_path, layout=lean).replaced({"parallel.layout": other})
    assert fields_of(recipe, list(both)) == fresh


def test_a_group_of_overrides_may_name_a_layout(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, f"parallel={{layout: {NAME}, cp_comm_type: all_gather}}")
    expected = known_layouts()[NAME] | {"parallel.cp_comm_type": "all_gather"}
    assert fields_of(recipe, list(expected)) == expected


OTHERS = [f"parallel.layout={NAME}", f"parallel={{layout: {NAME}}}"]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("order", [1, -1])
def test_a_layout_of_a_group_that_another_override_replaces_is_refused(
    other: str, order: int, tmp_path: Path
) -> None:
    overrides = [other, f"parallel={{{TP}: 2}}"][::order]
    with pytest.raises(ConfigError, match=r"override 'parallel=.* replaces all of parallel, "):
        recipe_of(tmp_path, *overrides)


def test_a_group_of_overrides_leaves_nothing_of_the_layout_of_the_file(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, f"parallel={{{TP}: 2}}", layout=NAME)
    levers = [name for name in known_layouts()[NAME] if not name.startswith("parallel.")]
    assert fields_of(recipe, levers) == fields_of(Recipe(), levers)
    assert (recipe.parallel.layout, recipe.parallel.tensor_model_parallel_size) == ("", 2)


def test_a_whole_recipe_is_read_when_the_name_of_its_layout_is_gone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, layout=NAME)
    tree = dataclasses.asdict(recipe)
    tree["parallel"]["layout"] = "7b-stage3-7x80"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe.replaced({"parallel": again.parallel})
    assert describe_named_layout(again).endswith("which docs/layouts.md no longer has")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("7b-stage3-8x81", "did you mean 7b-stage3-8x80 or"),
        ("7b-stage9-8x80", "did you mean"),
        ("fast", "is 'fast', which is no layout of docs/layouts.md"),
    ],
)
def test_an_unknown_layout_is_refused_with_near_names(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        recipe_of(tmp_path, layout=name)
    assert "own.yaml: parallel.layout is" in str(caught.value)
    with pytest.raises(ConfigError, match=f"override 'parallel.layout={name}'.*{said}"):
        recipe_of(tmp_path, f"parallel.layout={name}")


def test_an_empty_name_is_no_layout(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, layout="").parallel.tensor_model_parallel_size == 8
    recipe = recipe_of(tmp_path, "parallel.layout=''", "parallel.sequence_parallel=false")
    assert recipe.parallel.tensor_model_parallel_size == 8


def test_what_a_checkpoint_says_of_its_layout_changes_nothing() -> None:
    tree = {"parallel": {"layout": NAME, TP: 1}}
    assert recipe_from_dict(tree).parallel.tensor_model_parallel_size == 1


def test_a_dry_run_begins_with_the_name_of_the_layout(tmp_path: Path) -> None:
    report: Any = SimpleNamespace(world_size=8, data_parallel=1, stages=[])
    lines = dry_report._layout(recipe_of(tmp_path, layout=NAME), report, 8)
    assert next(lines) == f"layout {NAME}"
    assert next(lines).startswith("layout of 8 ranks: TP ")


def test_a_description_names_what_differs_from_the_layout(tmp_path: Path) -> None:
    assert describe_named_layout(recipe_of(tmp_path)) == ""
    assert describe_named_layout(recipe_of(tmp_path, layout=NAME)) == f"layout {NAME}"
    changed = recipe_of(tmp_path, layout=NAME, context_parallel_size=1)
    before = known_layouts()[NAME]["parallel.context_parallel_size"]
    said = f"layout {NAME}, but parallel.context_parallel_size 1 instead of {before}"
    assert describe_named_layout(changed) == said
