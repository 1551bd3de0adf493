"""Documents of a pack are isolated, and exactly their scored rows are trained, with and without context parallelism."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from document_checks import run_checks
from launch import torchrun


@pytest.fixture(scope="module", params=[1, 2], ids=["cp1", "cp2"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    if request.param == 1:
        return run_checks(1)
    path = tmp_path_factory.mktemp("documents") / "found.json"
    torchrun("document_checks.py", str(path), processes=2)
    return json.loads(path.read_text())


def test_noise_in_other_documents_changes_no_loss_and_no_gradient(found: dict) -> None:
    assert found["isolation"]["loss"] == 0.0
    assert found["isolation"]["gradient"] == 0.0


def test_one_token_answers_of_several_turns_are_trained_exactly(found: dict) -> None:
    assert found["exact_rows"]["ours"] == pytest.approx(found["exact_rows"]["plain"], rel=1e-6)
