"""Recipes are read from files and overrides, changed as copies, and described field by field."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import (
    CallbackConfig,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TextConfig,
    describe_fields,
    load_recipe,
    recipe_from_dict,
)
from megatron_vita.config.miniature import shrink
from megatron_vita.errors import ConfigError
from tests.config.recipes import AWARE, write

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("field", ["training.tensorboard_dir", "checkpoint.load", "data.plan"])
def test_an_empty_override_empties_a_field_of_text(tmp_path: Path, field: str) -> None:
    group, name = field.split(".")
    path = write(tmp_path, f"format_version: 1\n{group}: {{{name}: somewhere}}")
    for text in (f"{field}=", f"{field}=''"):
        assert getattr(getattr(load_recipe(path, [text]), group), name) == ""


def test_values_of_the_file_and_then_of_overrides_replace_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr: 3e-4}\nparallel: {tensor_model_parallel_size: 4}\n")
    recipe = load_recipe(
        path, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.parallel.tensor_model_parallel_size == 2
    assert recipe.parallel.sequence_parallel is True
    assert recipe.optimizer.clip_grad == 1.0


def test_a_recipe_builds_on_others_in_order_and_its_own_fields_win(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(
        tmp_path / "parts", "optimizer: {lr: 1e-3, clip_grad: 2.0}\ntraining: {seed: 1}\n"
    ).rename(tmp_path / "a.yaml")
    write(tmp_path / "parts", "base: [../a.yaml]\noptimizer: {lr: 2e-3}\n")
    recipe = load_recipe(
        write(tmp_path, "base: [a.yaml, parts/recipe.yaml]\noptimizer: {min_lr: 1e-4}\n")
    )
    assert (recipe.optimizer.lr, recipe.optimizer.clip_grad, recipe.optimizer.min_lr) == (
        2e-3,
        2.0,
        1e-4,
    )
    assert recipe.training.seed == 1


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("3.5", "3.5: cannot read the recipe"),
        ("{a: b.yaml}", "base is {'a': 'b.yaml'}: a list of recipe files is needed"),
        ("[[a.yaml]]", r"base is \[\['a.yaml'\]\]: a list of recipe files is needed"),
        ("none.yaml", "none.yaml: cannot read the recipe"),
        ("recipe.yaml", "base recipe.yaml includes this file again"),
        ("[none.yaml]", "none.yaml: cannot read the recipe"),
        ("[recipe.yaml]", "base recipe.yaml includes this file again"),
    ],
)
def test_wrong_bases_are_refused(tmp_path: Path, base: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, f"base: {base}"))


def test_a_recipe_survives_the_way_through_plain_values() -> None:
    recipe = Recipe()
    assert recipe_from_dict(dataclasses.asdict(recipe)) == recipe


def test_uneven_first_and_last_stages_share_the_layers_that_are_left(tmp_path: Path) -> None:
    first = "parallel.num_layers_in_first_pipeline_stage=10"
    last = "parallel.num_layers_in_last_pipeline_stage=14"
    path = write(tmp_path, "parallel: {pipeline_model_parallel_size: 4}")
    assert load_recipe(path, [first, last]).parallel.layers_of_stages(48) == [10, 12, 12, 14]
    assert load_recipe(path).parallel.layers_of_stages(48) == [12, 12, 12, 12]
    with pytest.raises(
        ConfigError, match=r"48 layers do not divide over 4 pipeline stages of which \{0: 10\}"
    ):
        load_recipe(path, [first])


def test_a_world_that_does_not_divide_is_refused() -> None:
    recipe = Recipe().replaced({"parallel.tensor_model_parallel_size": 4})
    with pytest.raises(ConfigError, match="6 ranks are not a multiple of 4"):
        recipe.data_parallel_size(6)
    with pytest.raises(ConfigError, match="global_batch_size 8 is not a multiple of the 3"):
        recipe.data_parallel_size(12)
    assert recipe.data_parallel_size(8) == 2


def test_interleaved_stages_need_packs_in_multiples_of_their_number() -> None:
    recipe = Recipe().replaced(
        {
            "parallel.pipeline_model_parallel_size": 3,
            "parallel.virtual_pipeline_model_parallel_size": 2,
        }
    )
    with pytest.raises(
        ConfigError, match=r"gives 8 packs to each of 1 replicas; .* multiple of .* 3"
    ):
        recipe.data_parallel_size(3)
    recipe = recipe.replaced({"training.global_batch_size": 9})
    assert recipe.data_parallel_size(3) == 1


def test_help_lists_every_field_with_type_default_and_a_line() -> None:
    text = "\n".join(describe_fields())
    assert "optimizer.lr: float = 0.0001\n      Peak learning rate." in text

    def leaves(cls: type, prefix: str = "") -> list[str]:
        names = []
        for field in dataclasses.fields(cls):
            owner = field.default_factory
            assert field.metadata["doc"], field.name
            if isinstance(owner, type) and dataclasses.is_dataclass(owner):
                names += leaves(owner, f"{prefix}{field.name}.")
            else:
                names.append(prefix + field.name)
        return names

    for name in leaves(Recipe):
        assert f"  {name}: " in text


def test_the_entry_prints_help_and_fails_in_one_line(tmp_path: Path) -> None:
    def entry(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "pretrain_vita.py", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    shown = entry("--help")
    assert shown.returncode == 0
    assert "parallel.context_parallel_size: int = 1" in shown.stdout
    failed = entry(str(tmp_path / "none.yaml"))
    assert failed.returncode == 1
    assert failed.stderr.strip().endswith("cannot read the recipe: No such file or directory")
    assert len(failed.stderr.strip().splitlines()) == 1


def test_a_miniature_never_touches_the_copies_of_the_run(tmp_path: Path) -> None:
    recipe = Recipe().replaced({"checkpoint.mirror": "s3://runs/one", "checkpoint.save": "ours"})
    tiny = shrink(recipe, world_size=1, bf16=False, data=tmp_path)
    assert (tiny.checkpoint.mirror, tiny.checkpoint.save) == ("", "ours-tiny")


def test_a_miniature_in_fp32_has_an_optimizer_that_runs_everywhere(tmp_path: Path) -> None:
    types = [
        "exp_avg_dtype=bf16",
        "main_grads_dtype=bf16",
        "store_param_remainders=true",
        "lr=3e-5",
    ]
    settings = [*AWARE, *(f"optimizer.{setting}" for setting in types)]
    recipe = load_recipe(write(tmp_path, "format_version: 1"), settings)
    tiny, on_gpus = (
        shrink(recipe, world_size=1, bf16=bf16, data=tmp_path) for bf16 in (False, True)
    )
    assert tiny.optimizer == OptimizerConfig(lr=3e-5)
    assert on_gpus.optimizer == recipe.optimizer


@pytest.mark.parametrize(
    ("groups", "width", "ranks", "works"),
    [(8, 128, 4, True), (2, 128, 8, True), (5, 128, 8, False), (1, 2, 8, False)],
)
def test_tensor_parallel_ranks_split_or_share_key_heads(
    groups: int, width: int, ranks: int, works: bool
) -> None:
    fields = {"num_query_groups": groups, "num_attention_heads": 40, "kv_channels": width}
    tree = {
        "model": {"language": fields},
        "parallel": {"tensor_model_parallel_size": ranks},
    }
    if works:
        assert recipe_from_dict(tree).model.language.query_groups_of_rank(ranks) >= 1
        return
    with pytest.raises(ConfigError, match=f"num_query_groups {groups} is neither a multiple nor"):
        recipe_from_dict(tree)


def test_a_shared_key_head_is_not_split_over_context_parallel_ranks() -> None:
    parallel = {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "cp_comm_type": "a2a"}
    with pytest.raises(ConfigError, match="but a TP rank has 1; use p2p"):
        recipe_from_dict({"model": {"language": {"num_query_groups": 2}}, "parallel": parallel})


def test_replaced_changes_a_copy_and_leaves_the_recipe() -> None:
    recipe = Recipe()
    text = TextConfig(system="Be brief.")
    changes = {
        "text": text,
        "text.template": "plain",
        "model.vision.num_layers": 3,
        "optimizer.lr": 1,
    }
    other = recipe.replaced(changes)
    assert other.text == TextConfig(system="Be brief.", template="plain")
    assert (other.model.vision.num_layers, other.optimizer.lr) == (3, 1.0)
    assert (
        other.replaced({"text": TextConfig(), "model": ModelConfig(), "optimizer.lr": 1e-4})
        == recipe
    )
    assert recipe == Recipe()


def test_fields_that_depend_on_each_other_are_replaced_at_once() -> None:
    changes = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
    assert Recipe().replaced(changes).parallel.sequence_parallel


def test_no_group_of_a_recipe_can_be_assigned_to() -> None:
    def groups(group: Any) -> Iterator[Any]:
        yield group
        for field in dataclasses.fields(group):
            if dataclasses.is_dataclass(inner := getattr(group, field.name)):
                yield from groups(inner)

    data = DataConfig(train=[DatasetConfig(name="a", shards="a.tar")])
    for group in [*groups(Recipe()), *data.train, CallbackConfig(path="a.B")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, 1)


def test_a_served_layout_need_not_divide_packs_but_weights() -> None:
    parallel = ParallelConfig(context_parallel_size=3)
    with pytest.raises(ConfigError, match="document_alignment 16 is not a multiple of 6"):
        Recipe().replaced({"parallel": parallel})
    assert Recipe().with_layout(parallel).parallel.context_parallel_size == 3
    with pytest.raises(ConfigError, match="num_attention_heads 40 is not a multiple of"):
        Recipe().with_layout(ParallelConfig(tensor_model_parallel_size=3))


@pytest.mark.parametrize(
    ("available", "used"),
    [(8, 8), (7, 4), (6, 4), (4, 4), (3, 2), (2, 2)],
)
def test_an_elastic_job_uses_whole_replicas_that_divide_the_batch(
    available: int, used: int
) -> None:
    fields = {"parallel.tensor_model_parallel_size": 2, "training.global_batch_size": 8}
    recipe = Recipe().replaced(fields)
    assert recipe.ranks_in_use(available) == available
    assert recipe.replaced({"parallel.elastic": True}).ranks_in_use(available) == used


def test_an_elastic_job_of_less_than_a_replica_is_refused() -> None:
    fields = {"parallel.tensor_model_parallel_size": 4, "parallel.elastic": True}
    with pytest.raises(ConfigError, match="3 ranks are not a multiple of 4"):
        Recipe().replaced(fields).ranks_in_use(3)
