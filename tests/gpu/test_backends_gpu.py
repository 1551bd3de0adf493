"""On GPUs: Transformer Engine and FlashAttention-4 give what the torch backend gives, by each CP
scheme."""

import json
from pathlib import Path

import pytest

from tests.functional.launch import torchrun
from tests.gpu.fields import GPUS, TE, fa4_layouts, te_layouts, world_of

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
LAYOUTS = {
    name: TE | {"seq_length": 2048} | fields
    for name, fields in (te_layouts() | fa4_layouts()).items()
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("backends")
    results: dict[str, dict[str, float]] = {}
    worker = Path(__file__).parent / "backend_worker.py"
    for world in sorted({world_of(fields) for fields in LAYOUTS.values()}):
        chosen = {name: fields for name, fields in LAYOUTS.items() if world_of(fields) == world}
        torchrun(worker, str(folder), json.dumps(chosen), processes=world)
        results |= json.loads((folder / f"found-{world}.json").read_text())
    print(json.dumps(results, indent=1))  # noqa: T201  kept with the results that the documentation quotes
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_backends_equal_the_torch_backend_within_bf16(found: dict, layout: str) -> None:
    result = found[layout]
    assert result["mean loss difference"] < 2e-3 * result["mean loss"]
    assert result["gradient cosine"] > 0.999
