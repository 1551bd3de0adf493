"""On GPUs, by each backend and CP scheme: documents are isolated bit by bit, or see earlier ones
where they should."""

import json
from pathlib import Path

import pytest

from tests.functional.launch import torchrun
from tests.gpu.fields import GPUS, TE, TORCH, fa4_layouts, te_layouts, world_of

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
PACK = {"seq_length": 2048}
LAYOUTS = {name: TE | PACK | fields for name, fields in (te_layouts() | fa4_layouts()).items()} | {
    "torch": TORCH | PACK
}
JOINED = {
    f"{name} joined": fields | {"isolate_documents": False} for name, fields in LAYOUTS.items()
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("documents")
    results: dict[str, dict] = {}
    cases = LAYOUTS | JOINED
    for world in sorted({world_of(fields) for fields in cases.values()}):
        path = folder / f"{world}.json"
        chosen = {name: fields for name, fields in cases.items() if world_of(fields) == world}
        torchrun("document_checks.py", str(path), json.dumps(chosen), processes=world)
        results |= json.loads(Path(path).read_text())
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_in_a_document_changes_no_loss_and_no_input_gradient_of_any_other(
    found: dict, layout: str
) -> None:
    poison = found[layout]["poison"]
    assert poison["before"] == poison["after"] == {"loss": 0.0, "gradient": 0.0}
    assert poison["itself"]["loss"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_documents_see_earlier_ones_and_not_later_ones(found: dict, layout: str) -> None:
    poison = found[f"{layout} joined"]["poison"]
    assert poison["before"]["loss"] == 0.0
    assert poison["after"]["loss"] > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_restart_at_each_document_unless_they_are_joined(
    found: dict, layout: str
) -> None:
    assert found[layout]["position"] < 0.05 < found[f"{layout} joined"]["position"]
