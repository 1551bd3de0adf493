"""Levers fill the memory there is, fastest first, and what cannot fit is refused with what could."""

import argparse
import dataclasses
from typing import Any

import pytest

from megatron_vita.config import Recipe, TrainingConfig
from megatron_vita.costs.changes import as_overrides, differences
from megatron_vita.costs.devices import H100, H200
from megatron_vita.costs.fitting import (
    LEVERS,
    MARGIN,
    NO_LEVERS,
    Room,
    fit_memory,
    memory_need,
    smallest,
)
from megatron_vita.costs.memory.memory import GIB, full_pack
from megatron_vita.costs.options import add_options, chosen_device, chosen_room, likely_device
from megatron_vita.costs.remedies import find_remedies, name_remedies
from megatron_vita.costs.step_time import step_time
from megatron_vita.costs.suggest import suggest
from megatron_vita.costs.suggest_report import describe_suggestions
from megatron_vita.errors import ConfigError
from tests.costs.measured import CP2, Measured


def recipe_of(length: int, **parallel: Any) -> Recipe:
    """Recipe of a 7B model on two devices, with one pack of so many thousand tokens."""
    measured = Measured(name="", peak=0, seconds=0, length=length * 1024, documents=1)
    recipe = measured.recipe().replaced(NO_LEVERS | {"training.recompute_vision": False})
    return recipe.replaced({f"parallel.{name}": value for name, value in parallel.items()})


def room_of(device: float, host: float = 120, **limits: float) -> Room:
    sizes = {name: int(value * GIB) for name, value in limits.items()}
    return Room(device=int(device * GIB), host=int(host * GIB), **sizes)


def fit(recipe: Recipe, room: Room) -> Recipe | None:
    return fit_memory(recipe, room, data_parallel=1, device=H200)


def seconds(recipe: Recipe) -> float:
    return step_time(recipe, H200, data_parallel=1, load=full_pack(recipe)).total


@pytest.mark.parametrize("length", [16, 32, 128, 256, 512, 1024])
@pytest.mark.parametrize("device", [100, 139.8, 300])
def test_what_is_chosen_fits_and_is_faster_than_the_least_there_is(
    length: int, device: float
) -> None:
    recipe = recipe_of(length)
    room = room_of(device)
    fitted = fit(recipe, room)
    least = smallest(recipe)
    if fitted is None:
        assert memory_need(least, data_parallel=1).device > room.device * (1 - MARGIN)
        return
    need = memory_need(fitted, data_parallel=1)
    assert need.device <= room.device * (1 - MARGIN)
    assert need.host <= room.host
    assert seconds(fitted) <= seconds(least)
    assert set(differences(recipe, fitted, LEVERS)) == {
        name for name in LEVERS if differences(recipe, fitted, (name,))
    }


def test_a_device_with_room_recomputes_nothing() -> None:
    fitted = fit(recipe_of(16), room_of(200))
    assert differences(recipe_of(16), fitted, LEVERS) == {}


def test_more_room_is_never_slower() -> None:
    recipe = recipe_of(128)
    times = [seconds(fit(recipe, room_of(gib))) for gib in (110, 120, 130, 140, 160, 200, 400)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.02 * times[-1]


def test_attention_is_kept_for_as_many_layers_as_there_is_room_for() -> None:
    """At a million tokens the host holds all inputs and some outputs of attention; one more layer
    that keeps attention would not fit."""
    recipe = recipe_of(1024)
    room = room_of(139.8)
    fitted = fit(recipe, room)
    kept = fitted.training.recompute_keep_attention_layers
    assert 0 < kept < 28
    more = fitted.replaced(
        {
            "training.recompute_keep_attention_layers": kept + 1,
        },
    )
    assert not memory_need(more, data_parallel=1).fits(room)
    larger = fit(recipe, room_of(139.8, host=240))
    assert larger.training.recompute_keep_attention_layers in (-1, 28)


def test_a_host_without_room_or_a_limit_keeps_activations_on_the_device() -> None:
    recipe = recipe_of(256)
    assert fit(recipe, room_of(139.8)).training.activation_offload_fraction > 0
    without = fit(recipe, room_of(139.8, host=12))
    assert without.training.activation_offload_fraction == 0
    assert 0 < fit(recipe, room_of(115, host=12)).training.recompute_keep_attention_layers < 28
    limited = fit(recipe, room_of(115, pinned=15))
    assert 0 < memory_need(limited, data_parallel=1).pinned <= 15 * GIB
    assert seconds(limited) > seconds(fit(recipe, room_of(115)))


def test_mlps_are_cut_until_attention_takes_more() -> None:
    fitted = fit(recipe_of(512), room_of(139.8))
    assert fitted.training.mlp_chunk_tokens == 65536
    assert fit(recipe_of(512), room_of(5000)).training.mlp_chunk_tokens == 0


def test_pieces_of_8_bit_layers_are_equally_long() -> None:
    """104K tokens are no multiple of pieces of 16K, and 8-bit layers refuse a shorter last one."""
    chunks: dict[str, set[int]] = {}
    for name in ("none", "tensorwise"):
        recipe = recipe_of(104).replaced({"training.fp8_recipe": name})
        fitted = [smallest(recipe), *(fit(recipe, room_of(gib)) for gib in range(80, 140, 5))]
        chunks[name] = {found.training.mlp_chunk_tokens for found in fitted if found}
    assert 16384 in chunks["none"]
    assert chunks["tensorwise"] - {0}
    assert all(104 * 1024 % chunk == 0 for chunk in chunks["tensorwise"] - {0})


def test_a_frozen_tower_and_a_text_model_are_not_recomputed() -> None:
    for fields in ({"training.freeze_vision_model": True}, {"model.text_only": True}):
        recipe = recipe_of(128).replaced(fields)
        fitted = fit(recipe, room_of(120))
        assert not fitted.training.recompute_vision


def test_every_stage_of_a_pipeline_fits() -> None:
    recipe = recipe_of(128, pipeline_model_parallel_size=4).replaced(
        {"training.global_batch_size": 8}
    )
    room = room_of(79.2)
    fitted = fit(recipe, room)
    assert memory_need(fitted, data_parallel=1).fits(room)
    assert differences(recipe, fitted, LEVERS)


def test_the_choice_depends_on_nothing_but_its_arguments() -> None:
    recipe = recipe_of(128)
    room = room_of(120)
    assert fit(recipe, room) == fit(recipe_of(128), room_of(120))
    assert recipe == recipe_of(128)  # untouched


@pytest.mark.parametrize(
    "fields", [{"recompute_granularity": "full"}, {"recompute_vision": True}], ids=str
)
def test_levers_beside_fit_memory_are_refused_by_field(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"training.{name} is .*fit_memory chooses it: set it to"):
        TrainingConfig(fit_memory=True, **fields)
    TrainingConfig(fit_memory=True, activation_offload_gib=10)


def test_what_does_not_fit_is_told_what_would_fastest_first() -> None:
    """128K tokens with nothing recomputed on 139.8 GiB: levers alone make it fit."""
    recipe = recipe_of(128)
    room = room_of(139.8)
    found = find_remedies(recipe, room, world_size=2, device=H200)
    times = [remedy.seconds for remedy in found]
    assert times == sorted(times)
    assert found[0].seconds == seconds(recipe.replaced(found[0].changes))
    assert memory_need(recipe.replaced(found[0].changes), data_parallel=1).fits(room)
    text = name_remedies(found, timed=True)
    assert text.startswith(as_overrides(found[0].changes))
    assert " s a step)" in text
    assert "s a step" not in name_remedies(found, timed=False)


def test_where_levers_do_not_do_a_leaner_optimizer_or_another_layout_is_named() -> None:
    """7B with 18 bytes per parameter on two cards of 79 GiB: 12 bytes fit."""
    recipe = recipe_of(32)
    room = room_of(79.2)
    (alone, *_) = find_remedies(recipe, room, world_size=2, device=H100)
    assert alone.changes["optimizer.store_param_remainders"] is True
    assert "optimizer.main_grads_dtype" not in alone.changes
    assert memory_need(recipe.replaced(alone.changes), data_parallel=1).fits(room)
    recipe = recipe.replaced({"training.global_batch_size": 8})
    found = find_remedies(recipe, room, world_size=8, device=H100)
    wider = [remedy for remedy in found if "parallel.context_parallel_size" in remedy.changes]
    assert wider
    assert not any(name.startswith("optimizer.") for name in wider[0].changes)
    assert "more devices" in name_remedies(
        find_remedies(recipe, room_of(10), world_size=8, device=H100), timed=True
    )


def test_a_leaner_optimizer_is_suggested_only_where_nothing_else_fits() -> None:
    """Checked for the layouts of two cards, and for those of eight."""
    two = suggest(recipe_of(32), room_of(79.2), world_size=2, device=H100, ranks_per_node=8)
    assert all("optimizer.exp_avg_dtype" in suggestion.changes for suggestion in two.best)
    batch = recipe_of(32).replaced({"training.global_batch_size": 8})
    eight = suggest(batch, room_of(79.2), world_size=8, device=H100, ranks_per_node=8)
    assert not any("optimizer.exp_avg_dtype" in suggestion.changes for suggestion in eight.best)
    lines = describe_suggestions(
        two, recipe=recipe_of(32), world_size=2, device=H100, room=room_of(79.2)
    )
    text = "\n".join(lines)
    assert "exp_avg_dtype=bf16" in text


def test_layouts_are_suggested_fastest_first_and_all_fit() -> None:
    recipe = recipe_of(128).replaced({"training.global_batch_size": 8})
    room = room_of(79.2)
    found = suggest(recipe, room, world_size=8, device=H100, ranks_per_node=8)
    times = [suggestion.prediction.seconds for suggestion in found.best]
    assert times == sorted(times)
    assert len(times) > 3
    for suggestion in found.best:
        assert suggestion.need.fits(room)
        assert suggestion.recipe == recipe.replaced(suggestion.changes)
        assert suggestion.recipe.parallel.replica_size <= 8
    text = "\n".join(
        describe_suggestions(found, recipe=recipe, world_size=8, device=H100, room=room)
    )
    assert "packs are one document full of tiles, with every eighth token a loss token" in text
    assert f"the first: {as_overrides(found.best[0].changes)}" in text
    assert "28 layers do not divide over 8 pipeline stages" in text
    small = suggest(recipe, room_of(45), world_size=8, device=H100, ranks_per_node=8)
    assert small.too_large > 0


def test_layouts_that_the_recipe_objects_to_are_not_suggested() -> None:
    """4 key heads cannot be split over 8 TP ranks; documents aligned to 16 over no more than 8 CP
    ranks."""
    recipe = recipe_of(128).replaced({"training.global_batch_size": 16})
    found = suggest(recipe, room_of(500), world_size=16, device=H200, ranks_per_node=8)
    objections = [first for first, *_ in found.refused.values()]
    assert any("num_query_groups 4 is not a multiple" in text for text in objections) or any(
        "num_attention_heads 28 is not a multiple" in text for text in objections
    )
    assert any("document_alignment 16 is not a multiple of 32" in text for text in objections)
    for suggestion in found.best:
        assert suggestion.recipe.parallel.tensor_model_parallel_size <= 4
        assert suggestion.recipe.parallel.context_parallel_size <= 8


def test_the_overrides_of_a_suggestion_make_its_recipe() -> None:
    recipe = recipe_of(128, **CP2, tensor_model_parallel_size=1, sequence_parallel=False)
    found = suggest(recipe, room_of(139.8), world_size=2, device=H200, ranks_per_node=8)
    for suggestion in found.best:
        assert as_overrides(suggestion.changes).count("=") == len(suggestion.changes)
        assert dataclasses.asdict(recipe.replaced(suggestion.changes)) == dataclasses.asdict(
            suggestion.recipe
        )


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_devices_and_room_are_as_the_command_line_says() -> None:
    assert chosen_device(options("--device", "h200")) is H200
    assert chosen_device(options(), here="NVIDIA H100 80GB HBM3") is H100
    assert chosen_device(options()) is None
    assert likely_device(options("--device-memory-gib", "141")) is H200
    assert likely_device(options("--device-memory-gib", "80")) is H100
    with pytest.raises(ConfigError, match="--device A100: its rates are not known; known: H100"):
        chosen_device(options("--device", "A100"))
    assert chosen_room(options(), H100) == room_of(79.2, host=125)
    named = options("--device-memory-gib", "70", "--host-memory-gib", "400")
    assert chosen_room(named, H100) == room_of(70, host=50)
    assert chosen_room(options(), None).device == 0
    assert chosen_room(options(), None, here=7).device == 7
