"""On two GPUs: Transformer Engine gives what the torch backend gives, and isolates documents."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))
from launch import torchrun

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("backends")
    worker = Path(__file__).parent / "backend_worker.py"
    torchrun(worker, str(folder), str(folder / "found.json"), "te", processes=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2"])
def test_transformer_engine_equals_the_torch_backend_within_bf16(found: dict, layout: str) -> None:
    result = found[layout]
    assert result["mean loss difference"] < 2e-3 * result["mean loss"]
    assert result["gradient cosine"] > 0.999


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2"])
def test_noise_in_other_documents_changes_no_loss(found: dict, layout: str) -> None:
    assert found[layout]["change by noise elsewhere"] == 0.0
