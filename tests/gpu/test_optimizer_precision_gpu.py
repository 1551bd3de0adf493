"""On GPUs, with Transformer Engine's Adam: a run goes on under any type and place of its optimizer's
state."""

import json
from pathlib import Path

import pytest

from megatron_vita import platform
from tests.functional.launch import torchrun
from tests.functional.layout_worker import open_layout, save_tensors
from tests.gpu.fields import GPUS, TORCH

pytestmark = pytest.mark.skipif(
    GPUS == 0 or not platform.has_transformer_engine(), reason="needs Transformer Engine"
)
AWARE = {"use_precision_aware_optimizer": True}
BF16 = {"main_grads_dtype": "bf16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
HOST = AWARE | {"optimizer_cpu_offload": True}
SETTINGS: dict[str, dict] = {
    "plain": {},
    "aware": AWARE,
    "remainders": AWARE | {"store_param_remainders": True},
    "bf16": AWARE | BF16,
    "least": AWARE | BF16 | {"store_param_remainders": True},
    "summed": AWARE | BF16 | {"reduce_scatter_with_fp32_accumulation": True},
    "fp8": AWARE | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"},
    "fp16 weights": AWARE | {"main_params_dtype": "fp16"},
    "host": HOST,
    "half on host": HOST | {"optimizer_offload_fraction": 0.5},
    "host overlapped": HOST | {"overlap_cpu_optimizer_d2h_h2d": True, "main_grads_dtype": "bf16"},
}
NAMES = list(SETTINGS)
PAIRS = [(name, name) for name in NAMES] + [
    pair for name in NAMES[1:] for pair in (("plain", name), (name, "plain"))
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Loss and gradient norm of the second step, by the setting of the first and of the second."""
    folder = tmp_path_factory.mktemp("precision")
    cases = {name: TORCH | settings for name, settings in SETTINGS.items()}
    platform.initialize_process()
    save_tensors(open_layout(dict(TORCH), None), folder / "start")
    torchrun(
        "reload_worker.py",
        str(folder),
        json.dumps(cases),
        json.dumps(PAIRS),
        processes=min(GPUS, 2),
    )
    results = json.loads(Path(folder / "found.json").read_text())
    print(json.dumps(results, indent=1))  # noqa: T201  kept with the results
    return results


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_the_second_step_is_that_of_full_precision(found: dict, pair: tuple[str, str]) -> None:
    loss, grad_norm = found[" to ".join(pair)]
    expected, norm = found["plain to plain"]
    assert loss == pytest.approx(expected, rel=2e-3)
    assert grad_norm == pytest.approx(norm, rel=0.02)
