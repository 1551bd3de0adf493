"""Estimates of memory against what was measured."""

import pytest

from megatron_vita.config import LanguageConfig, ModelConfig, Recipe, TrainingConfig
from megatron_vita.costs.memory import saving_memory
from megatron_vita.costs.parameters import model_parameters


@pytest.mark.parametrize(("ranks", "measured"), [(1, 25.5), (2, 18.6)])
def test_a_checkpoint_takes_the_hosts_memory_that_was_measured(ranks: int, measured: float) -> None:
    """Bytes for each parameter of a model in bf16, as in
    benchmarks/results/2026-11-27-saving.md."""
    recipe = Recipe(
        model=ModelConfig(text_only=True, language=LanguageConfig(num_layers=8, hidden_size=1024)),
        training=TrainingConfig(bf16=True),
    )
    estimate = saving_memory(recipe, 0, data_parallel=ranks) / model_parameters(recipe.model)
    assert estimate == pytest.approx(measured, rel=0.03)
