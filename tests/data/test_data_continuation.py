"""A plan that continues another: packs before the break stay, those after it are of the new mix."""

from pathlib import Path

import numpy as np
import pytest

from megatron_vita.config import Recipe
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.data.planning.plan import PackPlan, read_plan, write_plan
from megatron_vita.data.planning.planner import Continuation, make_plan
from megatron_vita.data.planning.stamp import plan_path
from megatron_vita.errors import ConfigError, DataError
from tests.data.toy_data import World, assert_same, changed, make_world, train_stream, write_shard
from tests.indexes import index_shard


def datasets(recipe: Recipe, **replaced: float) -> dict:
    """The mix with other ratios, in another order; a dataset without a ratio is gone."""
    entries = {entry.name: vars(entry) for entry in recipe.data.train}
    return {"train": [entries[name] | {"ratio": ratio} for name, ratio in replaced.items()]}


def named(plan: PackPlan, packs: slice) -> list[tuple]:
    """Documents of some packs, by the names of their datasets."""
    inside = np.isin(plan.columns["pack"], np.arange(plan.num_packs)[packs])
    rows = zip(
        *(plan.columns[name][inside].tolist() for name in ("dataset", "shard", "row", "tokens")),
        strict=True,
    )
    return [(plan.datasets[dataset] if dataset >= 0 else "gone", *rest) for dataset, *rest in rows]


@pytest.fixture
def planned(tmp_path: Path, world: World) -> tuple[Recipe, PackPlan]:
    """A world of its own, whose plan has three epochs."""
    recipe = changed(make_world(tmp_path, world.tokenizer), data={"epochs": 3})
    plan, _ = make_plan(recipe, "train", tokenizer=world.tokenizer)
    write_plan(plan, plan_path(recipe, "train"))
    return recipe, read_plan(plan_path(recipe, "train"))


def test_packs_before_the_break_stay_and_the_new_mix_follows(
    planned: tuple[Recipe, PackPlan], world: World
) -> None:
    recipe, old = planned
    mixed = changed(recipe, data=datasets(recipe, more=2.0, shapes=0.5) | {"epochs": 1})
    new, _ = make_plan(mixed, "train", tokenizer=world.tokenizer, continued=Continuation(old, 4))
    assert named(new, slice(4)) == named(old, slice(4))
    after = [name for name, *_ in named(new, slice(4, None))]
    assert (after.count("more"), after.count("shapes")) == (20, 15)
    assert new.history == [{"packs": 4, "stamp": old.stamp}]


def test_a_continued_plan_is_read_and_continued_again(
    planned: tuple[Recipe, PackPlan], world: World
) -> None:
    recipe, old = planned
    before = [train_stream_of(recipe, world)[pack] for pack in range(4)]
    mixed = changed(recipe, data=datasets(recipe, more=1.0, shapes=1.0))
    first, _ = make_plan(mixed, "train", tokenizer=world.tokenizer, continued=Continuation(old, 4))
    write_plan(first, plan_path(mixed, "train"))
    stream = train_stream_of(mixed, world)
    for pack, batch in enumerate(before):
        # the order changed
        batch.document_sources = 1 - batch.document_sources.where(batch.document_sources >= 0, 2)
        assert_same(stream[pack], batch)
    final = changed(recipe, data=datasets(recipe, shapes=1.0, more=1.0) | {"epochs": 1})
    second, _ = make_plan(
        final, "train", tokenizer=world.tokenizer, continued=Continuation(first, 7)
    )
    assert named(second, slice(7)) == named(first, slice(7))
    assert [entry["packs"] for entry in second.history] == [4, 7]


def train_stream_of(recipe: Recipe, world: World) -> PackStream:
    return open_split(recipe, split="train", tokenizer=world.tokenizer, tile_share=(0, 1))


def test_packs_of_a_dataset_that_is_gone_are_kept_but_cannot_be_read(
    planned: tuple[Recipe, PackPlan], world: World
) -> None:
    recipe, old = planned
    mixed = changed(recipe, data=datasets(recipe, more=1.0))
    new, _ = make_plan(mixed, "train", tokenizer=world.tokenizer, continued=Continuation(old, 4))
    assert new.num_packs > 4
    assert {name for name, *_ in named(new, slice(4))} == {"gone", "more"}
    assert {name for name, *_ in named(new, slice(4, None))} == {"more"}
    write_plan(new, plan_path(mixed, "train"))
    stream = train_stream_of(mixed, world)
    with pytest.raises(
        DataError, match="pack 1 holds a sample of a dataset or shard that the recipe no longer has"
    ):
        stream[0]
    assert stream[4].sample_keys


@pytest.mark.parametrize("pack", [-1, 999])
def test_a_break_outside_the_plan_is_refused(
    planned: tuple[Recipe, PackPlan], world: World, pack: int
) -> None:
    recipe, old = planned
    with pytest.raises(
        ConfigError, match=f"--continue-from is {pack}: the plan has {old.num_packs} packs"
    ):
        make_plan(recipe, "train", tokenizer=world.tokenizer, continued=Continuation(old, pack))


def test_another_break_shuffles_anew(planned: tuple[Recipe, PackPlan], world: World) -> None:
    recipe, old = planned
    plans = [
        make_plan(recipe, "train", tokenizer=world.tokenizer, continued=Continuation(old, pack))[0]
        for pack in (4, 5)
    ]
    assert named(plans[0], slice(4, 9)) != named(plans[1], slice(5, 10))
    assert train_stream(world).plan.history == []


def test_a_shard_whose_samples_changed_is_not_read_by_its_old_rows(
    planned: tuple[Recipe, PackPlan], world: World
) -> None:
    recipe, old = planned
    shard = write_shard(Path(recipe.data.plan).parent / "more-000000.tar", range(31, 41))
    index_shard(shard, world.tokenizer)
    new, _ = make_plan(recipe, "train", tokenizer=world.tokenizer, continued=Continuation(old, 4))
    kept = new.before(4)
    mine = old.before(4)["dataset"] == old.datasets.index("more")
    assert mine.any()
    assert (kept["shard"][mine] == -1).all()
    assert (kept["shard"][~mine] == old.before(4)["shard"][~mine]).all()


def test_a_shard_that_is_gone_stays_gone_when_the_plan_is_continued_again(
    planned: tuple[Recipe, PackPlan], world: World
) -> None:
    recipe, old = planned
    gone = Path(recipe.data.plan).parent / "shapes-000000.tar"
    gone.rename(gone.with_suffix(".away"))
    first, _ = make_plan(recipe, "train", tokenizer=world.tokenizer, continued=Continuation(old, 4))
    second, _ = make_plan(
        recipe, "train", tokenizer=world.tokenizer, continued=Continuation(first, 4)
    )
    lost = (old.before(4)["dataset"] == old.datasets.index("shapes")) & (
        old.before(4)["shard"] == 0
    )
    assert lost.any()
    for plan in (first, second):
        assert ((plan.before(4)["shard"] == -1) == lost).all()
