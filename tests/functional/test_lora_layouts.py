"""Adapters train at every layout as in a single process, and leave frozen weights as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.model.dora import DoraAdapter
from megatron_vita.model.lora import adapters_of
from megatron_vita.training.run.run import Run
from tests.functional.launch import MOST_PROCESSES, torchrun
from tests.functional.layout_worker import open_layout, run_steps, save_tensors, write_metrics
from tests.functional.layouts import Layout, layout_of
from tests.functional.test_layouts import (
    assert_equal_gradients,
    assert_equal_metrics,
    tensors,
)
from tests.scale import scaled

PLAIN = layout_of("untied")
ADAPTED: dict[str, dict[str, Any]] = {
    # The usual recipe of vision-language models: the tower trained fully beside.
    "language": {"freeze_language_model": True, "rank": 3, "alpha": 6.0},
    "everywhere": {
        "freeze_language_model": True,
        "freeze_vision_model": True,
        "freeze_projector": True,
        "rank": 3,
        "alpha": 6.0,
        "rslora": True,
        "targets": ["*"],
    },
    "some": {
        "freeze_language_model": True,
        "freeze_vision_model": True,
        "freeze_projector": True,
        "rank": 2,
        # Not the default: it would multiply updates by 16, and rounding with them.
        "alpha": 4.0,
        "targets": ["q_proj", "v_proj", "up_proj", "layers.2.*.down_proj", "projector.*"],
    },
    "dora": {
        "freeze_language_model": True,
        "freeze_vision_model": True,
        "freeze_projector": True,
        "rank": 3,
        "targets": ["q_proj", "v_proj", "o_proj", "mlp.*_proj", "projector.*"],
        "dora": True,
    },
    "preference": {
        "freeze_language_model": True,
        "freeze_vision_model": True,
        "freeze_projector": True,
        "rank": 3,
        "alpha": 6.0,
        "targets": ["*"],
        "beta": 0.1,
        "label_smoothing": 0.1,
    },
}
FEW = [
    ("everywhere", ("tp2sp", "kept_in_pieces", "from_pixels", "overlapped")),
    ("everywhere", ("pp2", "replicated", "attention_kept")),
    ("some", ("tp2",)),
    ("some", ("cp2", "mlp_pieces")),
    ("dora", ("tp2sp", "kept_in_pieces", "overlapped")),
    ("preference", ("tp2",)),
    ("preference", ("cp2", "attention_kept")),
    ("preference", ("pp2", "qwen3")),
    ("preference", ("dp2", "overlapped")),
]
MORE = [
    ("language", ("tp2",)),
    ("language", ("pp2vpp2", "uniform")),
    ("some", ("dp2", "overlapped", "half_offloaded")),
    ("language", ("tp2sp", "cp2", "half_offloaded", "overlapped", "qwen3")),
    ("language", ("tp2sp", "pp2vpp2", "mlp")),
    ("everywhere", ("tp2", "pp2first1", "full")),
    ("everywhere", ("tp2", "cp2", "recomputed", "one_group")),
    ("everywhere", ("tp2sp", "one_group", "dp2")),
    ("some", ("tp2sp", "dp2", "kept_in_pieces", "overlapped")),
    ("some", ("pp2", "cp2", "uniform", "replicated_overlapped")),
    ("preference", ("tp2sp", "pp2vpp2", "overlapped", "kept_in_pieces")),
    ("preference", ("tp2sp", "cp2", "from_pixels", "half_offloaded")),
    ("preference", ("dp2", "cp2", "tied")),
    ("dora", ("tp2",)),
    ("dora", ("tp2sp", "pp2", "mlp_pieces", "one_group")),
    ("dora", ("dp2", "cp2", "half_offloaded")),
]
CASES = [
    (kind, layout_of(*values))
    for kind, values in scaled(FEW, full=[*FEW, *MORE])
    if layout_of(*values).world <= MOST_PROCESSES
]


def fields_of(kind: str, layout: Layout) -> dict:
    return layout.fields | ADAPTED[kind]


def save_start(folder: Path, kind: str, layout: Layout) -> None:
    """Write weights to start from, with adapters that already change something."""
    run = open_layout(fields_of(kind, layout_of(layout.start)), None)
    generator = torch.Generator().manual_seed(3)
    for _, adapter in adapters_of(run.unwrapped_model):
        adapter.b.data.normal_(std=0.2, generator=generator)
        if isinstance(adapter, DoraAdapter):
            adapter.d.data.normal_(std=0.1, generator=generator)
    save_tensors(run, folder / f"start_{layout.start}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at every layout and at the single processes that they are compared with."""
    folder = tmp_path_factory.mktemp("lora")
    platform.initialize_process()
    for kind in dict.fromkeys(kind for kind, _ in CASES):
        layouts = [layout for of_kind, layout in CASES if of_kind == kind]
        place = folder / kind
        for layout in {layout.start: layout for layout in layouts}.values():
            save_start(place, kind, layout)
        for reference in dict.fromkeys(layout.reference for layout in layouts):
            metrics = run_steps(reference, place, fields=ADAPTED[kind])
            write_metrics(metrics, place / f"{reference.name}.json")
        for world in sorted({layout.world for layout in layouts}):
            values = [layout.values for layout in layouts if layout.world == world]
            fields = {layout.name: ADAPTED[kind] for layout in layouts}
            torchrun(
                "layout_worker.py",
                str(place),
                json.dumps(values),
                json.dumps(fields),
                processes=world,
            )
    return folder


@pytest.fixture(scope="module")
def readers(results: Path) -> dict[tuple[str, str], Run]:
    """Runs of a single process that read the tensors of any layout, by kinds of adapters and
    model."""
    found = {}
    for kind, layout in CASES:
        place = (kind, layout.start)
        if place not in found:
            found[place] = open_layout(fields_of(kind, layout_of(layout.start)), None)
    return found


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[f"{k}-{v.name}" for k, v in CASES])
def test_adapters_train_at_a_layout_as_in_a_single_process(
    results: Path, readers: dict[tuple[str, str], Run], kind: str, layout: Layout
) -> None:
    folder = results / kind
    # Losses of pairs come from differences of sums of some 50 nats.
    assert_equal_metrics(folder, layout, rel=1e-5 if kind == "preference" else 1e-6)
    reader = readers[kind, layout.start]
    names = (layout.reference.name, layout.name)
    gradients = [tensors(reader, folder / name / "gradients") for name in names]
    assert_equal_gradients(*gradients)
    assert all(
        grad.any() for name, grad in gradients[0].items() if name.endswith(("lora.a", "lora.d"))
    )
    start = tensors(reader, folder / f"start_{layout.start}")
    expected, actual = (tensors(reader, folder / name / "weights") for name in names)
    frozen = {n for n, p in reader.unwrapped_model.named_parameters() if not p.requires_grad}
    for name, weight in actual.items():
        if name in frozen:
            assert torch.equal(weight, start[name]), name
        else:
            torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)
            assert not torch.equal(weight, start[name]), name


def test_checkpoints_name_adapters_by_the_layer_of_the_whole_model(results: Path) -> None:
    run = open_layout(fields_of("some", PLAIN), None)
    keys = {tensor.key for tensor in _sharded(run) if ".lora." in tensor.key}
    assert "language_model.decoder.layers.2.mlp.linear_fc2.lora.a" in keys
    assert "language_model.decoder.layers.1.mlp.linear_fc2.lora.a" not in keys


def _sharded(run: Run) -> list:
    return list(store.model_state(run.unwrapped_models)["0"].values())
