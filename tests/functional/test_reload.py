"""A checkpoint of any layout is taken up by any other: the next step gives the same loss, gradients
and weights.

The model has a vocabulary and vision heads that the tensor-parallel ranks do not divide, so that
both are padded.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita import platform
from megatron_vita.checkpoint.store import find_checkpoint, load_weights
from tests.functional.launch import torchrun
from tests.functional.layout_worker import open_layout, save_tensors
from tests.functional.reload_worker import first_step, second_step
from tests.scale import scaled

ODD = {
    "vocab_size": 97,
    "vision": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "qk_layernorm": True,
        "init_method_std": 0.1,
    },
}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2sp": TP | {"sequence_parallel": True},
    "tp2together": TP | {"vision_tensor_parallel": True},
    "cp2": {"context_parallel_size": 2},
    "pp2first1": PP
    | {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
    "pp2vpp2": PP | {"virtual_pipeline_model_parallel_size": 2},
    "dp2overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "pp2overlapped": PP | {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
NAMES = list(LAYOUTS)
CYCLE = list(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
PAIRS = scaled(CYCLE, full=[(a, b) for a in NAMES for b in NAMES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reload")
    take_two_steps(folder, ODD, PAIRS)
    return folder


def take_two_steps(folder: Path, model: dict, pairs: list[tuple[str, str]]) -> None:
    """Two steps of a single process, and of two processes that change layout in between."""
    platform.initialize_process()
    save_tensors(open_layout(dict(model), None), folder / "start")
    first_step(dict(model), folder / "single", start=folder / "start")
    single = second_step(dict(model), folder / "single", weights=folder / "weights" / "single")
    cases = {name: model | fields for name, fields in LAYOUTS.items()}
    torchrun("reload_worker.py", str(folder), json.dumps(cases), json.dumps(pairs), processes=2)
    found = json.loads((folder / "found.json").read_text()) | {"single": single}
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_the_next_step_is_the_same_at_any_layout(folder: Path, pair: tuple[str, str]) -> None:
    found = json.loads((folder / "found.json").read_text())
    loss, grad_norm = found[" to ".join(pair)]
    assert loss == pytest.approx(found["single"][0], rel=1e-6)
    assert grad_norm == pytest.approx(found["single"][1], rel=1e-5)
    run = open_layout(dict(ODD), folder / "weights" / "single")
    expected = {name: p.detach().clone() for name, p in run.unwrapped_model.named_parameters()}
    load_weights(run.unwrapped_models, find_checkpoint(folder / "weights" / " to ".join(pair)))
    for name, parameter in run.unwrapped_model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.full("a minute")
def test_any_layout_takes_up_rounded_and_shared_weights_of_any_other(tmp_path: Path) -> None:
    """In bf16 the optimizer has weights of its own, which must round to the model's on every
    rank."""
    take_two_steps(
        tmp_path, ODD | {"bf16": True, "untie_embeddings_and_output_weights": False}, CYCLE
    )
    found = json.loads((tmp_path / "found.json").read_text())
    loss, grad_norm = found.pop("single")
    for pair, (other, norm) in found.items():
        assert other == pytest.approx(loss, rel=0.01), pair
        assert norm == pytest.approx(grad_norm, rel=0.05), pair
