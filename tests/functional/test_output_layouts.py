"""The output layer over ranks: every layout gives what fp32 logits of all positions give in a
single process."""

import json
from pathlib import Path

import pytest
import torch

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from tests.functional.launch import torchrun
from tests.functional.layout_worker import save_tensors
from tests.functional.output_worker import TIED, open_case, step_of_case
from tests.scale import scaled

SMOOTH: dict[str, dict] = {"output": {"label_smoothing": 0.1, "z_loss": 0.01}}
FULL = {"full_logits": True}
SHAPES: dict[str, dict] = {
    "untied": {},
    "tied": TIED,
    "untied_97": {"language": {"vocab_size": 97}} | SMOOTH,
    "tied_97": {"language": TIED["language"] | {"vocab_size": 97}} | SMOOTH,
    "frozen": {"training": {"freeze_language_model": True, "freeze_vision_model": True}},
}
TP, CP, PP = (
    {f"{name}_parallel_size": 2} for name in ("tensor_model", "context", "pipeline_model")
)
LAYOUTS: dict[str, dict] = {
    "tp2": TP,
    "tp2_sp": TP | {"sequence_parallel": True},
    "cp2": CP,
    "pp2": PP,
}
# Each shape over a stage or a shard, each layout with tied and untied weights.
CHOSEN = {
    "untied": ["cp2", "pp2"],
    "tied": ["tp2", "pp2"],
    "untied_97": ["tp2", "tp2_sp"],
    "tied_97": ["tp2_sp", "cp2"],
    "frozen": ["tp2_sp"],
}
ALL = {shape: list(LAYOUTS) for shape in SHAPES}
CASES: dict[str, tuple[str, dict]] = {
    f"{shape}_{layout}": (shape, SHAPES[shape] | {"parallel": LAYOUTS[layout]})
    for shape, layouts in scaled(CHOSEN, full=ALL).items()
    for layout in layouts
}
CASES["full_tp2_sp"] = (
    "tied_97",
    SHAPES["tied_97"] | {"output": SMOOTH["output"] | FULL, "parallel": LAYOUTS["tp2_sp"]},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the worker, and those of a single process with full logits."""
    folder = tmp_path_factory.mktemp("output")
    platform.initialize_process()
    losses = {}
    for shape, case in SHAPES.items():
        save_tensors(open_case(case, None), folder / shape / "start")
        full = case | {"output": case.get("output", {}) | FULL}
        losses[shape] = step_of_case(
            full, folder / shape / "gradients", start=folder / shape / "start"
        )
    (folder / "single.json").write_text(json.dumps(losses))
    torchrun("output_worker.py", str(folder), json.dumps(CASES), processes=2)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "found.json").read_text())


def test_vocabulary_shards_equal_one_vocabulary(found: dict[str, dict[str, float]]) -> None:
    assert len(found["shards"]) == 72
    for case, error in found["shards"].items():
        assert error <= 1e-5, case


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_full_logits_of_a_single_process(
    folder: Path, found: dict, name: str
) -> None:
    shape, _ = CASES[name]
    assert found["losses"][name] == pytest.approx(
        json.loads((folder / "single.json").read_text())[shape], rel=1e-6
    )
    run = open_case(SHAPES[shape], None)
    gradients = []
    for place in (folder / shape / "gradients", folder / name):
        load_weights(run.unwrapped_models, store.find_checkpoint(place))
        gradients.append(
            {name: p.detach().clone() for name, p in run.unwrapped_model.named_parameters()}
        )
    expected, actual = gradients
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    assert total > 0
    for parameter, grad in actual.items():
        difference = (grad - expected[parameter]).norm()
        assert difference <= 1e-5 * expected[parameter].norm() + 1e-8 * total, parameter


@pytest.mark.parametrize("check", ["overlap", "overlap, tied"])
def test_overlapped_gather_and_reduction_change_nothing_over_three_steps(
    found: dict[str, dict[str, float]], check: str
) -> None:
    for what, difference in found[check].items():
        assert difference <= (0 if what.startswith("weights") else 1e-5), what
