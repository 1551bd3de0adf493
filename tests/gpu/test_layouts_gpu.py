"""On GPUs, in bf16: every layout gives what a single GPU gives, as nearly as a single GPU gives it itself.

A single GPU runs each reference eight times, with the packs of a step in shuffled order. Losses and gradient norms of a
layout must lie within the range of those runs, widened to one unit in the last place of bf16. Its gradients and weights
may be no further from those of an fp32 run than those of the eight are, again widened by one unit.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from fields import GPUS, SIZES, TE, TORCH
from launch import torchrun
from layout_worker import open_layout, run_steps, save_tensors, write_metrics
from layouts import Layout, covering_layouts, layout_of

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from megatron_vita.training.run import Run

pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
WORLDS = tuple(world for world in (2, 4) if world <= max(GPUS, 2))
PLAIN = [layout_of(*v) for v in (("tp2",), ("tp2sp",), ("cp2",), ("pp2",), ("pp2vpp2",), ("dp2", "overlapped"))]
COVERING = covering_layouts(WORLDS)
ALL = bool(os.environ.get("VITA_TEST_ALL"))
LAYOUTS = [*PLAIN, *(COVERING if ALL else random.Random(7).sample(COVERING, 18))]
SCHEMES = ("p2p", "all_gather", "a2a")
SHUFFLES = 8
ULP = 2.0**-7  # largest distance of two neighbours of bf16, relative to them


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    platform.initialize_process()
    for kind in ("untied", "tied"):
        save_tensors(open_layout(layout_of(kind).fields | TE, None), folder / f"start_{kind}")
    for reference in dict.fromkeys(layout.reference for layout in LAYOUTS):
        _run_reference(reference, folder)
    for world in sorted({layout.world for layout in LAYOUTS}):
        for scheme in SCHEMES:
            chosen = [layout for layout in LAYOUTS if layout.world == world and _scheme(layout) == scheme]
            fields = TE | {"cp_comm_type": scheme}
            values = json.dumps([layout.values for layout in chosen])
            torchrun("layout_worker.py", str(folder), values, json.dumps(fields), processes=world)
    return folder


def _scheme(layout: Layout) -> str:
    """CP schemes take turns."""
    with_context = [other for other in LAYOUTS if other.value("context") == "cp2"]
    return SCHEMES[with_context.index(layout) % 3] if layout in with_context else SCHEMES[0]


def _run_reference(reference: Layout, folder: Path) -> None:
    """Eight runs in bf16 and one in fp32, from the same weights."""
    exact = run_steps(reference, folder, fields=TORCH | {"bf16": False}, out=f"{reference.name}/exact")
    write_metrics(exact, folder / reference.name / "exact.json")
    draw = random.Random(3)
    for i in range(SHUFFLES):
        order = tuple(draw.sample(range(4), 4))
        metrics = run_steps(reference, folder, fields=TE, out=f"{reference.name}/{i}", order=order)
        write_metrics(metrics, folder / reference.name / f"{i}.json")


@pytest.fixture(scope="module")
def readers(results: Path) -> dict[str, Run]:
    fields = SIZES | {"bf16": False, "attention_backend": "torch"}
    return {kind: open_layout(layout_of(kind).fields | fields, None) for kind in ("untied", "tied", "text_only")}


def _distances(reader: Run, exact: Path, others: list[Path]) -> list[dict[str, float]]:
    """Relative distance of each parameter's tensors from the exact ones."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        load_weights(reader.cores, store.find_checkpoint(folder))
        return {name: p.detach().clone() for name, p in reader.core.named_parameters()}

    truth = tensors(exact)
    total = torch.stack([tensor.norm() for tensor in truth.values()]).norm()
    found = []
    for other in others:
        differences = {name: (tensor - truth[name]).norm() for name, tensor in tensors(other).items()}
        found.append({name: (d / (truth[name].norm() + 1e-3 * total)).item() for name, d in differences.items()})
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_is_as_near_to_the_truth_as_a_single_gpu(results: Path, readers: dict[str, Run], layout: Layout) -> None:
    single = results / layout.reference.name
    runs = [json.loads((single / f"{i}.json").read_text()) for i in range(SHUFFLES)]
    for step, found in enumerate(json.loads((results / f"{layout.name}.json").read_text())):
        assert (found["rows"], found["tiles"]) == (runs[0][step]["rows"], runs[0][step]["tiles"])
        for what in ("loss", "grad_norm"):
            values = [run[step][what] for run in runs]
            middle, width = sum(values) / SHUFFLES, max(max(values) - min(values), ULP * max(values))
            assert abs(found[what] - middle) <= width, (what, step, found[what], values)
    reader = readers[layout.value("model")]
    for what in ("gradients", "weights"):
        others = [single / str(i) / what for i in range(SHUFFLES)]
        *near, mine = _distances(reader, single / "exact" / what, [*others, results / layout.name / what])
        for name, distance in mine.items():
            assert distance <= max(run[name] for run in near) + ULP, (what, name)
