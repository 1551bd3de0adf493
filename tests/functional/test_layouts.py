"""Every layout gives the losses, gradients and weights of a single process.

`make test` takes a seeded sample, `make test-all` all of the layouts in which each pair of features
meets.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.store import load_weights
from megatron_vita.training.run.run import Run
from tests.functional.launch import MOST_PROCESSES, torchrun
from tests.functional.layout_worker import open_layout, run_steps, save_tensors, write_metrics
from tests.functional.layouts import FEATURES, Layout, covering_layouts, layout_of
from tests.scale import scaled

PLAIN = [
    layout_of(*values)
    for values in (
        ("tp2",),
        ("tp2sp",),
        ("cp2",),
        ("pp2",),
        ("pp2vpp2",),
        ("dp2", "overlapped"),
        ("tp2", "cp2"),
        ("tp2", "qwen3"),
        ("tp2sp", "one_group"),
        ("tp2sp", "dp2", "overlapped", "kept_in_pieces", "from_pixels", "two_tiles"),
        ("pp2vpp2", "cp2", "half_offloaded", "qwen3"),
    )
]
COVERING = covering_layouts()
EIGHT = [layout_of("tp2sp", "cp2", "pp2", "overlapped", "full")]
SAMPLED = random.Random(2026).sample(COVERING, 2)
LAYOUTS = [*PLAIN, *scaled(SAMPLED, full=[*COVERING, *EIGHT])]
LAYOUTS = [layout for layout in LAYOUTS if layout.world <= MOST_PROCESSES]


def run_references(folder: Path, layouts: list[Layout]) -> None:
    """Run the single process that each layout is compared with; all start from the same weights."""
    platform.initialize_process()
    for kind in dict.fromkeys(layout.start for layout in layouts):
        save_tensors(open_layout(layout_of(kind).fields, None), folder / f"start_{kind}")
    for reference in dict.fromkeys(layout.reference for layout in layouts):
        write_metrics(run_steps(reference, folder), folder / f"{reference.name}.json")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at every layout and at the single processes that they are compared with."""
    folder = tmp_path_factory.mktemp("layouts")
    run_references(folder, LAYOUTS)
    for world in sorted({layout.world for layout in LAYOUTS}):
        values = [layout.values for layout in LAYOUTS if layout.world == world]
        torchrun("layout_worker.py", str(folder), json.dumps(values), "{}", processes=world)
    return folder


@pytest.fixture(scope="module")
def readers(results: Path) -> dict[str, Run]:
    """Runs of a single process that read the gradients and weights of any layout, by kind of
    model."""
    return {kind: open_layout(layout_of(kind).fields, None) for kind in FEATURES["model"]}


def tensors(reader: Run, folder: Path) -> dict[str, torch.Tensor]:
    load_weights(reader.unwrapped_models, store.find_checkpoint(folder))
    return {name: p.detach().clone() for name, p in reader.unwrapped_model.named_parameters()}


def assert_equal_metrics(results: Path, layout: Layout, *, rel: float = 1e-6) -> None:
    """Compare the metrics of a layout; `rel` is the tolerance of the losses."""
    names = (layout.reference.name, layout.name)
    expected, actual = (json.loads((results / f"{name}.json").read_text()) for name in names)
    for before, after in zip(expected, actual, strict=True):
        for name in ("rows", "tiles", "flops"):
            assert after[name] == before[name]
        assert before["rows"] > 0
        assert before["flops"] > 0
        assert (before["tiles"] > 0) == (layout.value("model") != "text_only")
        assert after["loss"] == pytest.approx(before["loss"], rel=rel)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5)
        # Rewards are differences of sums of some 50 nats, rounded to 1e-7 of them.
        assert after["preferences"] == pytest.approx(before["preferences"], rel=1e-5, abs=1e-5)


def assert_equal_gradients(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]
) -> None:
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert total > 0
    for name, grad in actual.items():
        difference = (grad - expected[name]).norm()
        assert difference <= 1e-5 * expected[name].norm() + 1e-8 * total, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_a_single_process(
    results: Path, readers: dict[str, Run], layout: Layout
) -> None:
    assert_equal_metrics(results, layout)
    reader = readers[layout.value("model")]
    folders = (results / layout.reference.name, results / layout.name)
    assert_equal_gradients(*(tensors(reader, folder / "gradients") for folder in folders))
    expected, actual = (tensors(reader, folder / "weights") for folder in folders)
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


def test_each_pair_of_features_meets() -> None:
    """Counted anew: values that can meet in any layout of 2 or 4 processes do in one of those that
    are run."""
    assert len(COVERING) >= 24
    together = {frozenset(pair) for layout in COVERING for pair in _pairs(layout)}
    for first, second in (
        ("tp2sp", "together"),
        ("pp2vpp2", "overlapped"),
        ("cp2", "joined"),
        ("dp2", "recomputed"),
    ):
        assert frozenset((first, second)) in together
    draw = random.Random(1)
    for _ in range(2000):
        values = tuple(draw.choice(list(known)) for known in FEATURES.values())
        if Layout(values).is_possible:
            assert {frozenset(pair) for pair in _pairs(Layout(values))} <= together


def _pairs(layout: Layout) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(layout.values) for b in layout.values[i + 1 :]]
