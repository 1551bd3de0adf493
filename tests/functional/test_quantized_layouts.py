"""Adapters beside 4-bit maps train at every layout as in a single process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.model.lora import adapters_of
from megatron_vita.training.run.run import Run
from tests.functional.launch import MOST_PROCESSES, torchrun
from tests.functional.layout_worker import open_layout, run_steps, save_tensors, write_metrics
from tests.functional.layouts import Layout, layout_of
from tests.functional.synthetic import QUANTIZED
from tests.functional.test_layouts import assert_equal_gradients, assert_equal_metrics
from tests.scale import scaled

FIELDS: dict[str, Any] = QUANTIZED | {
    "double_quant": True,
    "targets": ["*"],
    "alpha": 6.0,
    # Sums over longer rows than those of the tiny model would amplify rounding.
    "init_method_std": 0.14,
}
DENSE = {"quantize_base": "none", "quantize_block_size": 64, "double_quant": False}
FEW = [
    ("tp2",),
    ("tp2sp", "kept_in_pieces", "overlapped"),
    ("pp2first1", "attention_kept"),
    ("cp2", "mlp_pieces"),
]
MORE = [
    ("dp2", "overlapped", "half_offloaded"),
    ("tp2", "one_group"),
    ("tp2sp", "pp2vpp2", "mlp"),
    ("tp2sp", "cp2", "half_offloaded", "qwen3"),
    ("pp2", "cp2", "uniform", "replicated_overlapped"),
    ("tp2", "pp2first3", "full"),
    ("pp2vpp2", "uniform", "tied"),
    ("pp2first1", "dp2", "overlapped"),
]
LAYOUTS = [
    layout
    for layout in (layout_of(*values) for values in scaled(FEW, full=[*FEW, *MORE]))
    if layout.world <= MOST_PROCESSES
]


def save_start(folder: Path, layout: Layout) -> None:
    """Write the weights in their own type, and adapters that already change something."""
    start = layout_of(layout.start)
    run = open_layout(start.fields | FIELDS | DENSE, None)
    generator = torch.Generator().manual_seed(3)
    for _, adapter in adapters_of(run.unwrapped_model):
        adapter.b.data.normal_(std=0.2, generator=generator)
    save_tensors(run, folder / f"start_{layout.start}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at every layout and at the single processes that they are compared with."""
    folder = tmp_path_factory.mktemp("quantized")
    platform.initialize_process()
    for layout in {layout.start: layout for layout in LAYOUTS}.values():
        save_start(folder, layout)
    for reference in dict.fromkeys(layout.reference for layout in LAYOUTS):
        metrics = run_steps(reference, folder, fields=FIELDS)
        write_metrics(metrics, folder / f"{reference.name}.json")
    for world in sorted({layout.world for layout in LAYOUTS}):
        values = [layout.values for layout in LAYOUTS if layout.world == world]
        fields = json.dumps({layout.name: FIELDS for layout in LAYOUTS})
        torchrun("layout_worker.py", str(folder), json.dumps(values), fields, processes=world)
    return folder


@pytest.fixture(scope="module")
def readers(results: Path) -> dict[str, Run]:
    """Runs of a single process that read the tensors of any layout, by kinds of models."""
    return {
        layout.start: open_layout(layout_of(layout.start).fields | FIELDS, None)
        for layout in LAYOUTS
    }


def tensors(reader: Run, folder: Path) -> dict[str, Tensor]:
    """Tensors by name, without 4-bit maps, which are in no checkpoint."""
    state = {"model": store.model_state(reader.unwrapped_models)}
    loaded = store.load_state(store.find_checkpoint(folder), state)
    store.set_model_state(reader.unwrapped_models, loaded["model"])
    return {name: p.detach().clone() for name, p in reader.unwrapped_model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_4_bit_maps_train_adapters_at_a_layout_as_in_a_single_process(
    results: Path, readers: dict[str, Run], layout: Layout
) -> None:
    assert_equal_metrics(results, layout)
    reader = readers[layout.start]
    names = (layout.reference.name, layout.name)
    gradients = [tensors(reader, results / name / "gradients") for name in names]
    assert_equal_gradients(*gradients)
    assert all(grad.any() for name, grad in gradients[0].items() if name.endswith("lora.a"))
    expected, actual = (tensors(reader, results / name / "weights") for name in names)
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)
