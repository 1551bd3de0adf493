"""Attention by a kernel for many sequences, with keys gathered over context parallel ranks, is that of
the torch backend."""

import json
from pathlib import Path

import pytest

from tests.functional.launch import torchrun

TP = {"tensor_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
LAYOUTS = {
    "cp4 selective": {"context_parallel_size": 4, "recompute_granularity": "selective"},
    "cp2 one document": CP | {"isolate_documents": False},
    "tp2sp-cp2 full": TP | CP | {"sequence_parallel": True, "recompute_granularity": "full"},
    "cp4 kept": {
        "context_parallel_size": 4,
        "recompute_granularity": "full",
        "recompute_keep_attention_layers": -1,
        "mlp_chunk_tokens": 16,
    },
    "tp2 qwen3": TP | {"qk_layernorm": True, "add_qkv_bias": False},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Results of four processes at each layout."""
    path = tmp_path_factory.mktemp("flash") / "found.json"
    torchrun("flash_worker.py", str(path), json.dumps(LAYOUTS), processes=4)
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_the_torch_backend(found: dict, layout: str) -> None:
    assert max(found[layout]["differences"].values()) < 1e-5


def test_noise_in_a_document_changes_no_loss_and_no_input_gradient_of_any_other(
    found: dict,
) -> None:
    poison = found["cp4 selective"]["poison"]
    assert poison["before"] == poison["after"] == {"loss": 0.0, "gradient": 0.0}
    assert poison["itself"]["loss"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_keeps_own_query_key_value_output_and_log_sum_exp(
    found: dict, layout: str
) -> None:
    """Neither gathered keys nor the joint projection: elements a row, 4 heads and 2 groups of 8."""
    assert found[layout]["kept"] == sorted([4 * 8, 2 * 8, 2 * 8, 4 * 8, 4])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("tp")])
def test_scored_rows_have_the_losses_of_plain_pytorch(found: dict, layout: str) -> None:
    rows = found[layout]["exact_rows"]
    assert rows["ours"] == pytest.approx(rows["plain"], rel=1e-6)
