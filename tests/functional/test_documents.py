"""Documents are isolated, or see earlier ones where a recipe says so; exactly their scored rows are
trained."""

import json

import pytest

from tests.functional.document_checks import run_checks
from tests.functional.launch import MOST_PROCESSES, torchrun
from tests.functional.synthetic import tiny_recipe
from tests.scale import scaled

TP = {"tensor_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
LAYOUTS = {"plain": {}, "cp2": CP, "tp2": TP, "tp2sp": TP | {"sequence_parallel": True}}
if scaled(False, full=True) and MOST_PROCESSES >= 4:
    LAYOUTS["tp2sp-cp2"] = LAYOUTS["tp2sp"] | CP
JOINED = {"isolate_documents": False}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Results of the checks at each layout, with documents isolated and joined."""
    results: dict[str, dict] = {}
    folder = tmp_path_factory.mktemp("documents")
    cases = {
        f"{name}{suffix}": layout | data
        for name, layout in LAYOUTS.items()
        for suffix, data in VARIANTS
    }
    for world in (1, 2, 4):
        chosen = {name: fields for name, fields in cases.items() if _world(fields) == world}
        if world == 1:
            results |= {name: run_checks(tiny_recipe(**fields)) for name, fields in chosen.items()}
        elif chosen:
            path = folder / f"{world}.json"
            torchrun("document_checks.py", str(path), json.dumps(chosen), processes=world)
            results |= json.loads(path.read_text())
    return results


VARIANTS: tuple[tuple[str, dict], ...] = (("", {}), ("-joined", JOINED))


def _world(fields: dict) -> int:
    return fields.get("tensor_model_parallel_size", 1) * fields.get("context_parallel_size", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_in_a_document_changes_no_loss_and_no_input_gradient_of_any_other(
    found: dict, layout: str
) -> None:
    poison = found[layout]["poison"]
    assert poison["before"] == poison["after"] == {"loss": 0.0, "gradient": 0.0}
    assert poison["itself"]["loss"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_documents_see_earlier_ones_and_not_later_ones(found: dict, layout: str) -> None:
    poison = found[f"{layout}-joined"]["poison"]
    assert poison["before"]["loss"] == 0.0
    assert poison["after"]["loss"] > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_restart_at_each_document_unless_they_are_joined(
    found: dict, layout: str
) -> None:
    assert found[layout]["position"] < 1e-5
    assert found[f"{layout}-joined"]["position"] > 0.01


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("tp")])
@pytest.mark.parametrize("joined", ["", "-joined"])
def test_one_token_answers_of_several_turns_are_trained_exactly(
    found: dict, layout: str, joined: str
) -> None:
    rows = found[layout + joined]["exact_rows"]
    assert rows["ours"] == pytest.approx(rows["plain"], rel=1e-6)
