"""Page of layouts: the fastest for each size, stage and number of GPUs, as the cost model predicts.

    PYTHONPATH=. python benchmarks/layouts.py --write

Takes some minutes. Nothing is measured; docs/performance.md has the measured steps.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from records import with_table

from megatron_vita.config import Recipe
from megatron_vita.config.load import load_recipe
from megatron_vita.costs.devices import DEVICES, Device
from megatron_vita.costs.fitting import LEANEST, Room
from megatron_vita.costs.memory import GIB
from megatron_vita.costs.suggest import Suggestion, suggest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layouts.md"
SIZES = ("7b", "14b", "72b")
STAGES = (1, 2, 3, 4)
GPUS = (2, 4, 8, 16, 32, 64)
RANKS_PER_NODE = 8
HOST_GIB = 125
"""Memory of the host for each GPU."""
MARKS = ("<!-- layouts: written by benchmarks/layouts.py -->\n", "<!-- end of layouts -->\n")
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


def lines() -> Iterator[str]:
    """Yield a section for each size and device."""
    for size in SIZES:
        for device in DEVICES:
            yield f"## {size.upper()} on {device.name}, {device.memory_gib:.0f} GiB\n"
            yield f"| {' | '.join(COLUMNS)} |"
            yield "|---" * len(COLUMNS) + "|"
            for stage in STAGES:
                recipe = load_recipe(ROOT / f"examples/long_vita/{size}/stage{stage}.yaml")
                for gpus in GPUS:
                    yield _row(recipe, stage, gpus, device)
            yield ""


def _row(recipe: Recipe, stage: int, gpus: int, device: Device) -> str:
    room = Room(device=int(device.memory_gib * GIB), host=HOST_GIB * GIB)
    found = suggest(
        recipe, room, world_size=gpus, device=device, ranks_per_node=min(gpus, RANKS_PER_NODE)
    )
    start = f"| {stage} | {gpus} | "
    if not found.best:
        return start + "nothing fits | | | | | | |"
    return start + " | ".join(_cells(found.best[0], gpus)) + " |"


def _cells(best: Suggestion, gpus: int) -> list[str]:
    parallel = best.recipe.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
        gpus // parallel.replica_size,
    )
    rate = best.prediction.tokens_per_second_per_gpu or 0.0
    return [
        " x ".join(str(size) for size in sizes),
        ", ".join(_levers(best)) or "none",
        f"{best.need.device / GIB:.0f}",
        f"{best.need.host / GIB:.0f}",
        f"{best.prediction.seconds:.1f}",
        f"{rate:,.0f}",
        f"{1e9 / (rate * gpus) / 3600:,.1f}",
    ]


def _levers(best: Suggestion) -> Iterator[str]:
    training = best.recipe.training
    if training.recompute_granularity == "selective":
        yield f"recomputed: {' and '.join(training.recompute_modules)}"
    if training.recompute_granularity == "full":
        keep = training.recompute_keep_attention_layers
        yield f"recomputed, keep {'all' if keep == -1 else keep}"
    if training.mlp_chunk_tokens:
        yield f"MLP by {training.mlp_chunk_tokens:,}"
    if training.activation_offload_fraction:
        yield f"offloaded {training.activation_offload_fraction:.0%}"
    if any(name in best.changes for name in LEANEST):
        yield "lean"


def main() -> None:
    """Print the page or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    tables = "\n".join(lines())
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(), tables, marks=MARKS))
    else:
        print(tables)  # noqa: T201


if __name__ == "__main__":
    main()
