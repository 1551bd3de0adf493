"""Host memory for activations is checked before the first step, and refused by the field's name."""

import pytest

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.errors import ConfigError, PlatformError
from megatron_vita.model import offload
from megatron_vita.parallel import groups
from megatron_vita.training.run import host_buffers
from megatron_vita.training.run.run import assemble_run
from tests.functional.synthetic import tiny_recipe

NEEDED = 4 * 2 * 128 * 32 * 4  # input and attention output of four layers


def recipe_of(**fields: object) -> Recipe:
    platform.initialize_process()
    recipe = tiny_recipe(
        recompute_granularity="full", recompute_keep_attention_layers=-1, activation_offload_fraction=1.0, **fields
    )  # fmt: skip
    groups.initialize_groups(recipe.parallel)
    return recipe


def test_a_limit_that_is_too_small_is_refused() -> None:
    recipe = recipe_of(activation_offload_gib=NEEDED / 2**30 - 1e-6)
    with pytest.raises(ConfigError, match=r"activation_offload_gib is .*: raise it, or lower"):
        assemble_run(recipe)
    assemble_run(recipe_of(activation_offload_gib=NEEDED / 2**30))


def test_a_host_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffers, "available_host_memory", lambda: NEEDED - 1)
    with pytest.raises(
        ConfigError, match=r"host memory .*available: lower training.activation_off"
    ):
        assemble_run(recipe_of())
    monkeypatch.setattr(host_buffers, "available_host_memory", lambda: NEEDED)
    assemble_run(recipe_of())


def test_memory_that_cannot_be_pinned_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(sizes: list[int]) -> None:
        raise PlatformError("cannot be had")

    monkeypatch.setattr(offload, "host_buffers", refuse)
    with pytest.raises(PlatformError, match="cannot be had"):
        assemble_run(recipe_of())


def test_all_buffers_are_there_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    get = offload.host_buffers
    monkeypatch.setattr(offload, "host_buffers", lambda sizes: asked.extend(sizes) or get(sizes))
    run = assemble_run(recipe_of())
    assert sum(asked) == NEEDED
    store = run.unwrapped_model.language_model.decoder.layers[0].store
    assert store.buffers.count == len(asked) == 8
