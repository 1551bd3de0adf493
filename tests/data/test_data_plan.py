"""The plan: a pure function of indexes, recipe and seed, refused where it does not fit, nothing
lost silently."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vita.costs.flops import variable_cost
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.planning.plan import PackPlan, read_plan, write_plan
from megatron_vita.data.planning.planner import make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.data.shards.tar import SampleWriter
from megatron_vita.errors import ConfigError, DataError
from tests.data.toy_data import World, changed, make_world, talk, toy_recipe, write_shard
from tests.indexes import index_of, index_shard


def samples_of(plan: PackPlan) -> list[tuple[int, int, int]]:
    return list(
        zip(*(plan.columns[name].tolist() for name in ("dataset", "shard", "row")), strict=True)
    )


def test_same_inputs_give_same_bytes_wherever_they_lie(world: World, tmp_path: Path) -> None:
    recipe = make_world(tmp_path / "elsewhere", world.tokenizer)
    for split in ("train", "validation"):
        assert plan_path(world.recipe, split).read_bytes() == plan_path(recipe, split).read_bytes()


def test_layout_and_workers_do_not_change_the_plan(world: World, tmp_path: Path) -> None:
    parallel = {
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
    }
    recipe = changed(
        world.recipe, parallel=parallel, data={"num_workers": 5}, training={"global_batch_size": 64}
    )
    plan, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    write_plan(plan, tmp_path / "train.arrow")
    assert (tmp_path / "train.arrow").read_bytes() == plan_path(world.recipe, "train").read_bytes()


def test_grouped_plans_know_no_stages_and_no_frozen_parts_and_group_whole_steps(
    world: World, tmp_path: Path
) -> None:
    recipe = changed(
        world.recipe, data={"group_by_cost": True, "epochs": 5}, training={"global_batch_size": 2}
    )
    other = changed(
        recipe, parallel={"pipeline_model_parallel_size": 2}, training={"freeze_vision_model": True}
    )
    plans = [make_plan(each, "train", tokenizer=world.tokenizer)[0] for each in (recipe, other)]
    for place, plan in enumerate(plans):
        write_plan(plan, tmp_path / str(place))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    costs = np.array(
        [
            variable_cost(recipe, plan.lengths_of(i), tiles=plan.tiles_of(i))
            for i in range(plan.num_packs)
        ]
    )
    pairs = costs[: len(costs) // 2 * 2].reshape(-1, 2)
    shifted = costs[1 : (len(costs) + 1) // 2 * 2 - 1].reshape(-1, 2)
    assert np.mean(pairs.max(1) / pairs.mean(1)) < np.mean(shifted.max(1) / shifted.mean(1)) - 0.05


def test_each_epoch_has_every_sample_once_in_its_own_order(world: World) -> None:
    recipe = changed(world.recipe, data={"epochs": 3})
    plan, rejected = make_plan(recipe, "train", tokenizer=world.tokenizer)
    samples = samples_of(plan)
    epochs = [samples[i : i + 40] for i in range(0, 120, 40)]
    assert rejected == []
    assert plan.num_documents == 120
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    once, _ = make_plan(world.recipe, "train", tokenizer=world.tokenizer)
    assert samples_of(once) == epochs[0]
    packs = plan.columns["pack"]
    assert packs[39] < packs[40]
    assert packs[79] < packs[80]


def test_another_seed_gives_another_training_plan_and_the_same_validation_plan(
    world: World,
) -> None:
    recipe = changed(world.recipe, data={"seed": 5, "epochs": 2})
    train, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    assert samples_of(train)[:40] != samples_of(read_plan(plan_path(world.recipe, "train")))
    validation, _ = make_plan(recipe, "validation", tokenizer=world.tokenizer)
    planned = read_plan(plan_path(world.recipe, "validation"))
    assert validation.stamp == planned.stamp
    assert samples_of(validation) == samples_of(planned)


def test_packs_hold_what_fits(world: World) -> None:
    plan = read_plan(plan_path(world.recipe, "train"))
    for pack in range(plan.num_packs):
        entries = plan.pack(pack)
        assert sum(-(-entry.tokens // 16) * 16 for entry in entries) <= 256
        assert plan.tiles_of(pack) == sum(entry.tiles for entry in entries)
    assert sum(len(plan.pack(i)) for i in range(plan.num_packs)) == plan.num_documents
    with pytest.raises(IndexError, match="pack 999"):
        plan.pack(999)


def test_joined_documents_are_packed_without_padding(world: World) -> None:
    recipe = changed(world.recipe, data={"isolate_documents": False})
    plan, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    odd = 0
    for pack in range(plan.num_packs):
        total = int(plan.lengths_of(pack).sum())
        assert total <= 256
        odd += total % 16 != 0
    assert odd > 0


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"data": {"seq_length": 512}}, "data.seq_length is 256 in the plan and 512 now"),
        ({"data": {"seed": 7}}, "data.seed is 1234 in the plan and 7 now"),
        (
            {"data": {"document_alignment": 32}},
            "data.document_alignment is 16 in the plan and 32 now",
        ),
        ({"data": {"shuffle_window": 9}}, "data.shuffle_window is 16 in the plan and 9 now"),
        (
            {"data": {"isolate_documents": False}},
            "data.isolate_documents is True in the plan and False now",
        ),
        ({"model": {"text_only": True}}, "model.text_only is False in the plan and True now"),
        ({"data": {"epochs": 2}}, "data.epochs is 1 in the plan and 2 now"),
        ({"media": {"max_tiles": 6}}, "media.max_tiles is 4 in the plan and 6 now"),
        ({"media": {"max_fps": 1.0}}, "media.max_fps is 4.0 in the plan and 1.0 now"),
    ],
)
def test_a_plan_of_another_recipe_is_refused_by_field_and_values(
    world: World, groups: dict[str, Any], message: str
) -> None:
    recipe = changed(world.recipe, **groups)
    with pytest.raises(DataError, match=message.replace(".", r"\.")) as error:
        open_split(recipe, split="train", tokenizer=world.tokenizer, tile_share=None)
    assert "vita data plan RECIPE" in str(error.value)


def test_a_plan_of_other_samples_is_refused(own_world: World) -> None:
    shard = write_shard(own_world.root / "more-000000.tar", range(31, 41))
    index_shard(shard, own_world.tokenizer)
    with pytest.raises(
        DataError,
        match=r"data\.train\[1\]\.shards\.more-000000\.tar is \w{16} in the plan and \w{16} now",
    ):
        open_split(own_world.recipe, split="train", tokenizer=own_world.tokenizer, tile_share=None)


def test_a_plan_of_fewer_shards_is_refused(own_world: World) -> None:
    shutil.copy(own_world.root / "more-000000.tar", own_world.root / "more-000001.tar")
    path = index_of(own_world.root / "more-000000.tar")
    shutil.copy(path, path.with_name(path.name.replace("000000", "000001")))
    with pytest.raises(
        DataError,
        match=r"data\.train\[1\]\.shards\.more-000001\.tar is absent in the plan and \w{16} now",
    ):
        open_split(own_world.recipe, split="train", tokenizer=own_world.tokenizer, tile_share=None)


def test_a_missing_plan_says_what_to_run(world: World) -> None:
    recipe = changed(world.recipe, data={"plan": "/nowhere"})
    with pytest.raises(
        DataError, match=r"/nowhere/train\.arrow: there is no plan; .*vita data plan RECIPE"
    ):
        open_split(recipe, split="train", tokenizer=world.tokenizer, tile_share=None)


@pytest.mark.parametrize(
    ("fields", "split", "message"),
    [
        ({"plan": ""}, "train", r"data\.plan is empty"),
        ({"validation": []}, "validation", r"data\.validation is empty"),
        (
            {"train": [{"name": "x", "shards": "/no/*.tar"}]},
            "train",
            r"/no/\*\.tar finds no shards",
        ),
        (
            {"train": [{"name": "x", "shards": "/dev/null"}]},
            "train",
            "null, which is not a .tar shard",
        ),
    ],
)
def test_a_recipe_without_data_is_refused(
    world: World, fields: dict[str, Any], split: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_split(
            changed(world.recipe, data=fields),
            split=split,
            tokenizer=world.tokenizer,
            tile_share=None,
        )


def test_two_shards_of_one_name_are_refused(own_world: World) -> None:
    write_shard(own_world.root / "copy" / "more-000000.tar", range(2))
    data = {"train": [{"name": "x", "shards": f"{own_world.root}/**/more-*.tar"}]}
    recipe = changed(own_world.recipe, data=data)
    with pytest.raises(ConfigError, match="two shards are called"):
        make_plan(recipe, "train", tokenizer=own_world.tokenizer)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.arrow").write_bytes(b"no")
    with pytest.raises(DataError, match="not a pack plan"):
        read_plan(tmp_path / "train.arrow")


def test_samples_longer_than_a_pack_are_left_out_and_listed(world: World) -> None:
    recipe = toy_recipe(world.root, seq_length=128)
    plan, rejected = make_plan(recipe, "train", tokenizer=world.tokenizer)
    whole = read_plan(plan_path(world.recipe, "train"))
    too_long = [
        key
        for key in zip(samples_of(whole), whole.columns["tokens"].tolist(), strict=True)
        if key[1] > 128
    ]
    assert len(rejected) == len(too_long) == 40 - plan.num_documents > 0
    tokens = {int(entry.reason.split()[0]) for entry in rejected}
    assert tokens == {length for _, length in too_long}
    assert rejected[0].reason.endswith("tokens do not fit data.seq_length 128")
    assert (rejected[0].split, rejected[0].dataset) == ("train", "shapes")


def test_a_strict_plan_stops_at_a_sample_longer_than_a_pack(world: World) -> None:
    with pytest.raises(
        DataError,
        match=r"shapes-000000\.tar sample s\d+: \d+ tokens do not fit data.seq_length 128",
    ):
        make_plan(
            toy_recipe(world.root, seq_length=128), "train", tokenizer=world.tokenizer, strict=True
        )


def test_a_plan_without_any_sample_is_refused(world: World) -> None:
    with pytest.raises(
        DataError,
        match=r"none of its 40 samples can be used\. .* 48 tokens do not fit data\.seq_length 16",
    ):
        make_plan(toy_recipe(world.root, seq_length=16), "train", tokenizer=world.tokenizer)


def test_counts_of_a_plan_are_those_of_its_columns(world: World) -> None:
    plan = read_plan(plan_path(world.recipe, "validation"))
    assert plan.num_tokens == np.sum(plan.columns["tokens"])
    assert plan.columns["tokens"].dtype == np.int32


def test_an_epoch_without_packs_does_not_start_the_numbering_anew(
    tmp_path: Path, world: World
) -> None:
    """Each epoch takes half of two samples, of which one is longer than a pack."""
    shard = tmp_path / "talk-000000.tar"
    with SampleWriter(shard) as writer:
        writer.write("short", record=talk("Which colour?", "It is red."), media={})
        writer.write("long", record=talk("Which colour? " * 400, "It is red."), media={})
    index_shard(shard, world.tokenizer)
    entry = {"name": "talk", "shards": f"{tmp_path}/talk-*.tar", "ratio": 0.5}
    recipe = changed(world.recipe, data={"train": [entry], "validation": [], "epochs": 12})
    plan, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    assert 0 < plan.num_packs < 12
    assert plan.columns["pack"].tolist() == list(range(plan.num_packs))
    single = [changed(recipe, data={"epochs": 1, "seed": seed}) for seed in range(20)]
    with pytest.raises(
        DataError, match=r"data\.train: the samples of its epochs are all longer than a pack"
    ):
        [make_plan(once, "train", tokenizer=world.tokenizer) for once in single]


def test_a_ratio_too_small_for_one_sample_is_refused(world: World) -> None:
    entries = [vars(entry) for entry in world.recipe.data.train]
    recipe = changed(world.recipe, data={"train": [entries[0], entries[1] | {"ratio": 0.05}]})
    message = r"dataset more: ratio 0\.05 of its 10 samples is less than one: .* a ratio of 0\.1 takes one"
    with pytest.raises(ConfigError, match=message):
        make_plan(recipe, "train", tokenizer=world.tokenizer)
