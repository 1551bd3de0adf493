"""Every layout gives the losses, gradients and weights of a single process."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launch import torchrun
from layout_worker import open_layout, save_tensors, two_steps
from synthetic import tiny_recipe

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from megatron_vita.parallel import groups
from megatron_vita.training.run import Run, assemble_run

TP, CP, PP = ({f"{name}_parallel_size": 2} for name in ("tensor_model", "context", "pipeline_model"))
SP = TP | {"sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_vision": True}
INTERLEAVED = {"virtual_pipeline_model_parallel_size": 2}
ON_TWO = {
    "tp2": TP,
    "tp2_sp": SP,
    "cp2": CP,
    "pp2": PP,
    "dp2": {},
    "dp2_replicated_optimizer": {"use_distributed_optimizer": False},
    "dp2_overlap": OVERLAP,
    "cp2_overlap_recompute": CP | OVERLAP | RECOMPUTE,
    "pp2_uneven_recompute_one_layer": PP
    | {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}
    | RECOMPUTE
    | {"recompute_num_layers": 1},
    "tp2_sp_recompute_attention": SP | {"recompute_granularity": "selective"},
    "pp2_interleaved": PP | INTERLEAVED,
}
ON_FOUR = {
    "tp2_cp2": TP | CP,
    "tp2_sp_cp2": SP | CP,
    "tp2_sp_pp2_recompute": SP | PP | RECOMPUTE,
    "tp2_sp_dp2_overlap": SP | OVERLAP,
    "cp2_pp2": CP | PP,
    "pp2_dp2_overlap": PP | OVERLAP,
    "tp2_sp_pp2_interleaved": SP | PP | INTERLEAVED,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps at every layout, the single process first, whose first weights all start from."""
    folder = tmp_path_factory.mktemp("layouts")
    platform.initialize_process()
    recipe = tiny_recipe()
    groups.initialize_groups(recipe.parallel)
    save_tensors(assemble_run(recipe), folder / "start")
    metrics = two_steps(open_layout({}, folder / "start"), folder / "single")
    rows = [{"loss": m.loss, "grad_norm": m.grad_norm, "rows": m.loss_rows, "tiles": m.tiles} for m in metrics]
    (folder / "single.json").write_text(json.dumps(rows))
    torchrun("layout_worker.py", str(folder), json.dumps(ON_TWO), processes=2)
    torchrun("layout_worker.py", str(folder), json.dumps(ON_FOUR), processes=4)
    return folder


@pytest.fixture(scope="module")
def reader(results: Path) -> Run:
    groups.initialize_groups(tiny_recipe().parallel)
    return assemble_run(tiny_recipe())


def tensors(reader: Run, folder: Path) -> dict[str, torch.Tensor]:
    load_weights(reader.cores, store.find_checkpoint(folder))
    return {name: p.detach().clone() for name, p in reader.core.named_parameters()}


@pytest.mark.parametrize("layout", [*ON_TWO, *ON_FOUR])
def test_layout_equals_a_single_process(results: Path, reader: Run, layout: str) -> None:
    expected, actual = (json.loads((results / f"{name}.json").read_text()) for name in ("single", layout))
    for step in (0, 1):
        assert actual[step]["rows"] == expected[step]["rows"]
        assert actual[step]["tiles"] == expected[step]["tiles"]
        assert actual[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-6)
        assert actual[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-5)
    gradients = tensors(reader, results / "single" / "gradients")
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, grad in tensors(reader, results / layout / "gradients").items():
        difference = (grad - gradients[name]).norm()
        assert difference <= 1e-5 * gradients[name].norm() + 1e-8 * total, name
    weights = tensors(reader, results / "single" / "weights")
    for name, weight in tensors(reader, results / layout / "weights").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0, msg=name)
