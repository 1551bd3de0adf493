"""On GPUs, in bf16: every layout gives what a single GPU gives, as nearly as a single GPU gives it
itself.

A single GPU runs each reference eight times, with the packs of a step in shuffled order and their
tiles in turns of different length. Losses and gradient norms of a layout must lie within the range
of those runs, widened to one unit in the last place of bf16; all its gradients and weights, taken
together, no farther than theirs from those of an fp32 run,
widened likewise. A single tensor may be three times as far: partial sums of a tensor parallel layer
and of dealt tiles are rounded to bf16 each, which shows most in a bias, where much cancels.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from megatron_vita.training.run.run import Run
from megatron_vita.training.step.step import train_step
from tests.functional.launch import torchrun
from tests.functional.layout_worker import (
    STEPS,
    my_batches,
    open_layout,
    save_tensors,
    whole_gradients,
)
from tests.functional.layouts import Layout, covering_layouts, layout_of
from tests.gpu.fields import GPUS, SIZES, TE, TORCH, canonical
from tests.scale import scaled

pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
WORLDS = tuple(world for world in (2, 4) if world <= max(GPUS, 2))
PLAIN = [
    layout_of(*v)
    for v in (("tp2",), ("tp2sp",), ("cp2",), ("pp2",), ("pp2vpp2",), ("dp2", "overlapped"))
]
COVERING = covering_layouts(WORLDS)
SIMPLE = [
    layout
    for layout in COVERING
    if sum(map(str.__ne__, layout.reference.values, layout_of().values)) <= 1
]
LAYOUTS = [*PLAIN, *scaled(random.Random(7).sample(SIMPLE, 12), full=COVERING)]
SCHEMES = ("p2p", "all_gather", "a2a")
SHUFFLES = 8
TURNS = (64, 1, 2, 3)  # tiles at once
TOGETHER = "all parameters"
ULP = 2.0**-7  # largest distance of two neighbours of bf16, relative to them


@dataclass
class Outcome:
    """Results of three steps: metrics of each, gradients of the first, weights after the last."""

    steps: list[dict]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    platform.initialize_process()
    for kind in ("untied", "tied"):
        save_tensors(open_layout(layout_of(kind).fields | TE, None), folder / f"start_{kind}")
    for world in sorted({layout.world for layout in LAYOUTS}):
        chosen = [layout for layout in LAYOUTS if layout.world == world]
        fields = {layout.name: TE | {"cp_comm_type": _scheme(layout)} for layout in chosen}
        values = [layout.values for layout in chosen]
        torchrun(
            "layout_worker.py", str(folder), json.dumps(values), json.dumps(fields), processes=world
        )
    return folder


def _scheme(layout: Layout) -> str:
    """CP schemes take turns."""
    with_context = [other for other in LAYOUTS if other.value("context") == "cp2"]
    if layout in with_context:
        return SCHEMES[with_context.index(layout) % 3]
    return SCHEMES[0]


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[Layout, list[Outcome]]:
    """For each reference an fp32 run, then eight in bf16, from the same weights."""
    found = {}
    draw = random.Random(3)
    for reference in dict.fromkeys(layout.reference for layout in LAYOUTS):
        found[reference] = [
            _run_alone(reference, folder, fields=TORCH | {"bf16": False}, order=[0, 1, 2, 3])
        ]
        for shuffle in range(SHUFFLES):
            fields = TE | {"vision_tiles_at_once": TURNS[shuffle % len(TURNS)]}
            found[reference].append(
                _run_alone(reference, folder, fields=fields, order=draw.sample(range(4), 4))
            )
    return found


def _run_alone(layout: Layout, folder: Path, *, fields: dict, order: list[int]) -> Outcome:
    """Run on one GPU, with the packs of each step in `order`."""
    kind = "tied" if layout.value("model") == "tied" else "untied"
    run = open_layout(layout.fields | fields, folder / f"start_{kind}")
    steps = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        packs = my_batches(run, step)
        metrics = train_step(run, iter([packs[i] for i in order]))
        steps.append(
            {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "rows": metrics.loss_tokens}
        )
        gradients = gradients or {
            _plain(name): grad.float() for name, grad in whole_gradients(run).items()
        }
    weights = {
        canonical(name): p.detach().float() for name, p in run.unwrapped_model.named_parameters()
    }
    return Outcome(steps, gradients, weights)


def _plain(name: str) -> str:
    """Name without the number of the only chunk."""
    return canonical(name.removeprefix("0."))


@pytest.fixture(scope="module")
def readers(folder: Path) -> dict[str, Run]:
    fields = SIZES | {"bf16": False, "attention_backend": "torch"}
    return {
        kind: open_layout(layout_of(kind).fields | fields, None)
        for kind in ("untied", "tied", "text_only")
    }


def _read(reader: Run, folder: Path) -> dict[str, Tensor]:
    load_weights(reader.unwrapped_models, store.find_checkpoint(folder))
    return {name: p.detach().clone() for name, p in reader.unwrapped_model.named_parameters()}


def _distances(truth: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of each parameter's tensor from the true one, and of all as one
    (`TOGETHER`)."""
    norms = torch.stack([true.norm() for true in truth.values()])
    apart = torch.stack([(other[name] - true).norm() for name, true in truth.items()])
    relative = apart / (norms + 1e-3 * norms.norm())
    return dict(zip(truth, relative.tolist(), strict=True)) | {
        TOGETHER: (apart.norm() / norms.norm()).item()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_is_as_near_to_the_truth_as_a_single_gpu(
    folder: Path, references: dict[Layout, list[Outcome]], readers: dict[str, Run], layout: Layout
) -> None:
    exact, *runs = references[layout.reference]
    for step, found in enumerate(json.loads((folder / f"{layout.name}.json").read_text())):
        assert found["rows"] == runs[0].steps[step]["rows"]
        for what in ("loss", "grad_norm"):
            values = [run.steps[step][what] for run in runs]
            middle = sum(values) / SHUFFLES
            width = max(max(values) - min(values), ULP * max(values))
            assert abs(found[what] - middle) <= width, (what, step, found[what], values)
    for what in ("gradients", "weights"):
        truth = getattr(exact, what)
        near = [_distances(truth, getattr(run, what)) for run in runs]
        mine = _distances(truth, _read(readers[layout.value("model")], folder / layout.name / what))
        for name, distance in mine.items():
            farther = 1 if name == TOGETHER else 3
            assert distance <= farther * max(run[name] for run in near) + ULP, (what, name)
