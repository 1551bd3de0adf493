"""Three replicas, shares of a document, stages or slices of a layer, none a power of two, give one
process's digits."""

from pathlib import Path

import pytest
import yaml

from tests.functional.recorded_run import run
from tests.functional.toy_run import data_tools, make_toy_run

LAYOUTS = {
    "dp3": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    "cp3": ["parallel.context_parallel_size=3"],
    "pp3": ["parallel.pipeline_model_parallel_size=3"],
    "tp3": ["parallel.tensor_model_parallel_size=3", "parallel.sequence_parallel=true"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a model whose layers, heads and widths are multiples of three, with six packs per
    step."""
    path = make_toy_run(tmp_path_factory.mktemp("toy"))
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["language"] |= {
        "num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "num_query_groups": 3,
    }  # fmt: skip
    recipe["data"] |= {
        "seq_length": 288,
        "document_alignment": 12,
        "plan": str(path.parent / "plan3"),
    }
    recipe["training"] |= {
        "global_batch_size": 6,
        "train_iters": 2 * len(LAYOUTS),
        "eval_interval": 1,
    }
    # whatever train_iters is
    recipe["optimizer"] |= {"min_lr": recipe["optimizer"]["lr"], "lr_warmup_fraction": 0.0}
    recipe["checkpoint"]["save_interval"] = 2
    path.write_text(yaml.safe_dump(recipe))
    data_tools("plan", path)
    return path


@pytest.mark.full("two minutes")
def test_a_run_that_changes_layout_every_two_steps_has_the_digits_of_one_process(
    recipe: Path, tmp_path: Path
) -> None:
    alone = run(recipe, tmp_path / "alone", processes=1)
    found: dict[int, dict] = {}
    for i, overrides in enumerate(LAYOUTS.values(), start=1):
        found |= run(
            recipe, tmp_path / "threes", f"training.train_iters={2 * i}", *overrides, processes=3
        )
    assert sorted(found) == sorted(alone)
    for step, row in alone.items():
        assert sorted(set(found[step]["packs"])) == row["packs"]
        assert found[step]["loss"] == pytest.approx(row["loss"], rel=1e-5), step
        assert found[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4), step
