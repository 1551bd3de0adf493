"""Kills between which the layout and the number of ranks change: the losses stay those of a run at
one layout, and each pack is consumed once."""

import itertools
import signal
import sys
from pathlib import Path

from tests.faults.job import BATCH, make_run, packs_of, start, steps_of
from tests.faults.rows import Row
from tests.faults.worker import Fault

EVERY = 8
"""Steps at each layout."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "2 replicas": (2, []),
    "TP 2 with SP": (
        2,
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    "1 rank": (1, []),
    "CP 2": (2, ["parallel.context_parallel_size=2"]),
    "PP 2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "TP 2 of 2 replicas": (4, ["parallel.tensor_model_parallel_size=2"]),
}
"""Ranks and overrides of each layout."""
MOST_DIFFERENCE = 1e-6
"""Difference of a loss from that of the run at one layout, as a fraction."""


def change_layouts(count: int, folder: Path) -> list[Row]:
    """Go through all layouts in turn, with a kill before each change, `count` times."""
    names = list(LAYOUTS)
    row = Row(
        kind="SIGKILL and change of layout and rank count",
        rule=f"losses of all steps within {MOST_DIFFERENCE:g} of those at one layout, each pack "
        "consumed once",
    )
    steps = EVERY * len(names)
    recipe = make_run(folder / "toy", steps=steps)
    assert start(recipe, folder / "whole") == 0, "the run without kills fails"
    expected = steps_of(folder / "whole")
    for number in range(count):
        place = folder / f"changed_{number}"
        # Each run begins at another layout.
        first = number % len(names)
        order = names[first:] + names[:first]
        _run_through(recipe, place, order)
        found = steps_of(place)
        worst = max(abs(found[s]["loss"] / expected[s]["loss"] - 1) for s in expected)
        sys.stderr.write(f"run {number}: losses differ by {worst:.1e} at most\n")
        is_same = worst < MOST_DIFFERENCE and packs_of(place) == list(range(steps * BATCH))
        for _ in itertools.pairwise(order):
            row.count(is_same)
    return [row]


def _run_through(recipe: Path, folder: Path, order: list[str]) -> None:
    for number, name in enumerate(order, 1):
        ranks, overrides = LAYOUTS[name]
        faults = [Fault(place="step", step=number * EVERY, victim=-1, delay=0.0)]
        if number == len(order):
            faults = []
        code = start(
            recipe, folder, *overrides, faults=[vars(fault) for fault in faults], ranks=ranks
        )
        sys.stderr.write(f"{folder.name}, {name}: exit code {code}\n")
        expected = 0 if number == len(order) else -signal.SIGKILL
        assert code == expected, f"{folder}: {name}: exit code {code}"
