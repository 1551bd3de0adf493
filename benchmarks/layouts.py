"""Layouts by name, and their page: the fastest for each size, stage and number of GPUs, as the cost
model predicts.

    PYTHONPATH=. python benchmarks/layouts.py --write

Takes some minutes. Nothing is measured; docs/performance.md has the measured steps.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from records import with_table

from megatron_vita.config import Recipe
from megatron_vita.config.load import load_recipe
from megatron_vita.config.named_layouts import FILE
from megatron_vita.costs.devices import DEVICES, Device
from megatron_vita.costs.fitting import LEANEST, LEVERS, NO_LEVERS, Room
from megatron_vita.costs.memory.memory import GIB
from megatron_vita.costs.suggest import LAYOUT, Suggestion, suggest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layouts.md"
SIZES = ("7b", "14b", "72b")
STAGES = (1, 2, 3, 4)
GPUS = (2, 4, 8, 16, 32, 64)
RANKS_PER_NODE = 8
MEMORY = {"H100": 80, "H200": 141}
"""Memory of devices in GB, as it is sold and as names of layouts have it."""
HOST_GIB = 125
"""Memory of the host for each GPU."""
MARKS = ("<!-- layouts: written by benchmarks/layouts.py -->\n", "<!-- end of layouts -->\n")
GOVERNED = (*dict.fromkeys((*LAYOUT, *LEVERS, *NO_LEVERS)),)
"""Fields that every layout sets; those of the optimizer only where nothing fits otherwise."""
COLUMNS = (
    "stage",
    "GPUs",
    "TP x CP x PP x DP",
    "levers",
    "GiB a device",
    "host GiB a GPU",
    "s a step",
    "tokens/s/GPU",
    "hours a billion tokens",
)


USUAL = {field: attrgetter(field)(Recipe()) for field in GOVERNED}


class Found(NamedTuple):
    """The fastest layout of a stage on a number of GPUs; None if nothing fits."""

    size: str
    stage: int
    gpus: int
    device: Device
    best: Suggestion | None


def search() -> Iterator[Found]:
    """Search the layouts of each size, device, stage and number of GPUs."""
    for size, device, stage in itertools.product(SIZES, DEVICES, STAGES):
        recipe = load_recipe(recipe_file(size, stage))
        room = Room(device=int(device.memory_gib * GIB), host=HOST_GIB * GIB)
        for gpus in GPUS:
            nodes = min(gpus, RANKS_PER_NODE)
            found = suggest(recipe, room, world_size=gpus, device=device, ranks_per_node=nodes)
            best = found.best[0] if found.best else None
            yield Found(size, stage, gpus, device, best)


def recipe_file(size: str, stage: int) -> Path:
    """Recipe of a size and a stage."""
    return ROOT / f"examples/long_vita/{size}/stage{stage}.yaml"


def layout_name(size: str, stage: int, gpus: int, device: Device) -> str:
    """Name of a layout in recipes: 7b-stage3-8x80."""
    return f"{size}-stage{stage}-{gpus}x{MEMORY[device.name]}"


def lines(everything: list[Found]) -> Iterator[str]:
    """Yield a section for each size and device."""
    section = ("", "")
    for found in everything:
        if section != (found.size, found.device.name):
            if section[0]:
                yield ""
            section = (found.size, found.device.name)
            device = found.device
            yield f"## {found.size.upper()} on {device.name}, {device.memory_gib:.0f} GiB\n"
            yield f"| {' | '.join(COLUMNS)} |"
            yield "|---" * len(COLUMNS) + "|"
        yield _row(found)
    yield ""


def _row(found: Found) -> str:
    start = f"| {found.stage} | {found.gpus} | "
    if found.best is None:
        return start + "nothing fits | | | | | | |"
    return start + " | ".join(_cells(found.best, found.gpus)) + " |"


def named_fields(recipe: Recipe) -> dict[str, Any]:
    """Fields of a recipe that its layout governs and that differ from the usual ones."""
    return {
        field: value
        for field in (*GOVERNED, *(LEANEST if is_lean(recipe) else ()))
        if (value := attrgetter(field)(recipe)) != USUAL.get(field)
    }


def named(everything: list[Found]) -> str:
    """Content of layouts.json: a line for each layout."""
    entries = [
        f"  {json.dumps(layout_name(*found[:4]))}: {json.dumps(named_fields(found.best.recipe))}"
        for found in everything
        if found.best is not None
    ]
    usual = json.dumps(USUAL, indent=1)
    return f'{{"usual": {usual},\n"layouts": {{\n{",\n".join(entries)}\n}}}}\n'


def _cells(best: Suggestion, gpus: int) -> list[str]:
    rate = best.prediction.tokens_per_second_per_gpu or 0.0
    return [
        sizes_of(best.recipe, gpus),
        ", ".join(levers(best.recipe)) or "none",
        f"{best.need.device / GIB:.0f}",
        f"{best.need.host / GIB:.0f}",
        f"{best.prediction.seconds:.1f}",
        f"{rate:,.0f}",
        f"{1e9 / (rate * gpus) / 3600:,.1f}",
    ]


def sizes_of(recipe: Recipe, gpus: int) -> str:
    """Format TP x CP x PP x DP."""
    parallel = recipe.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
        gpus // parallel.replica_size,
    )
    return " x ".join(str(size) for size in sizes)


def is_lean(recipe: Recipe) -> bool:
    """Return true if the optimizer takes fewer bytes a parameter than usual."""
    return recipe.optimizer.use_precision_aware_optimizer


def levers(recipe: Recipe) -> Iterator[str]:
    """Yield the memory levers of a recipe in words."""
    training = recipe.training
    if training.recompute_granularity == "selective":
        yield f"recomputed: {' and '.join(training.recompute_modules)}"
    if training.recompute_granularity == "full":
        keep = training.recompute_keep_attention_layers
        yield f"recomputed, keep {'all' if keep == -1 else keep}"
    if training.mlp_chunk_tokens:
        yield f"MLP by {training.mlp_chunk_tokens:,}"
    if training.activation_offload_fraction:
        yield f"offloaded {training.activation_offload_fraction:.0%}"
    if is_lean(recipe):
        yield "lean"


def main() -> None:
    """Print the page or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} and {FILE.name}")
    options = parser.parse_args()
    everything = list(search())
    tables = "\n".join(lines(everything))
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(), tables, marks=MARKS))
        FILE.write_text(named(everything))
    else:
        print(tables)  # noqa: T201


if __name__ == "__main__":
    main()
