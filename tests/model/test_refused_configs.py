"""Errors of megatron-core name the fields as the recipe does."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vita.errors import ConfigError
from megatron_vita.model.build import transformer_config
from tests.inference.tiny import tiny_recipe

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_attention_heads": 9}, {"tensor_model_parallel_size": 2}, "model.language.num_attention_heads"),
    ({"num_attention_heads": 9}, {"tensor_model_parallel_size": 2}, "parallel.tensor_model_parallel_size"),
    ({}, {"num_layers_in_first_pipeline_stage": 1}, "parallel: Mismatch: 1 middle layers"),
    ({"num_query_groups": 3}, {"tensor_model_parallel_size": 2}, "model.language.num_query_groups"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "parallel", "name"), REFUSED)
def test_a_config_that_megatron_core_refuses_is_named_by_the_recipes_fields(
    tmp_path: Path, language: dict[str, Any], parallel: dict[str, Any], name: str
) -> None:
    recipe = tiny_recipe(tmp_path)
    for group, values in ((recipe.model.language, language), (recipe.parallel, parallel)):
        for field, value in values.items():
            # Past the recipe's own checks, which would refuse most of these first.
            object.__setattr__(group, field, value)
    with pytest.raises(ConfigError) as caught:
        transformer_config(recipe, fused=False)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
