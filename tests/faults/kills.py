"""SIGKILL at random moments of a run that saves in the background: the end is that of a run without
kills, bit for bit, and each pack is consumed once."""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.job import BATCH, last_tensors, make_run, packs_of, start
from tests.faults.rows import Row
from tests.faults.worker import PLACES

STEPS = 200
FIRST = 12
APART = 18
"""Steps between two kills: more than two saves, so that the run has come on in between."""
ALL = -1
RULE = "final tensors bit-identical to those of a run without kills, each pack consumed once"


def kill_runs(count: int, folder: Path) -> list[Row]:
    """Kill `count` runs, each once in every place, of one rank and of all."""
    recipe = make_run(folder / "toy", steps=STEPS)
    mirror = f"checkpoint.mirror=file://{folder / 'whole_store'}"
    assert start(recipe, folder / "whole", mirror) == 0, "the run without kills fails"
    expected = last_tensors(folder / "whole"), packs_of(folder / "whole")
    assert expected[1] == list(range(STEPS * BATCH)), "the run without kills loses packs"
    kinds = [(place, victim) for place in PLACES for victim in ("one rank", "all ranks")]
    rows = {kind: Row(kind=_name(*kind), rule=RULE) for kind in kinds}
    for number in range(count):
        struck = kill_one_run(recipe, folder / f"killed_{number}", kinds, seed=number)
        found = last_tensors(folder / f"killed_{number}"), packs_of(folder / f"killed_{number}")
        _tell_differences(number, found, expected)
        for kind in struck:
            rows[kind].count(found == expected)
    return list(rows.values())


def _tell_differences(
    number: int, found: tuple[dict[str, int], list[int]], expected: tuple[dict[str, int], list[int]]
) -> None:
    tensors = [key for key in expected[0] if found[0].get(key) != expected[0][key]]
    packs = sorted(set(found[1]) ^ set(expected[1]))
    sys.stderr.write(
        f"run {number}: of {len(expected[0])} tensors {len(tensors)} differ {tensors[:3]}, "
        f"{len(found[1])} packs, {len(packs)} differ {packs[:5]}\n"
    )


def kill_one_run(
    recipe: Path, folder: Path, kinds: Sequence[tuple[str, str]], *, seed: int
) -> list[tuple[str, str]]:
    """Start a run until it is done, with a kill of each kind; return the kinds that came about."""
    chance = random.Random(seed)
    mirror = f"checkpoint.mirror=file://{folder}_store"
    faults: list[dict[str, Any]] = []
    struck = []
    for number, kind in enumerate(chance.sample(list(kinds), len(kinds))):
        faults.append(
            _fault(*kind, step=FIRST + number * APART + chance.randrange(6), chance=chance)
        )
        struck.append(kind)
        # The death of a loader does not end the start in which it happens.
        if kind[0] == "loader":
            continue
        code = start(recipe, folder, mirror, faults=faults)
        sys.stderr.write(f"run {seed}: {_name(*kind)} from step {faults[-1]['step']}: {code}\n")
        if code == 0:
            raise AssertionError(f"{folder}: the kill {faults[-1]} did not come about")
        faults = []
    assert start(recipe, folder, mirror, faults=faults) == 0, f"{folder}: is not done"
    return struck


def _fault(place: str, victim: str, *, step: int, chance: random.Random) -> dict[str, Any]:
    # The first rank alone publishes and uploads.
    ranks = [0] if place in ("rename", "upload") else [0, 1]
    number = ALL if victim == "all ranks" else chance.choice(ranks)
    return {"place": place, "step": step, "victim": number, "delay": chance.uniform(0, 0.2)}


def _name(place: str, victim: str) -> str:
    if place == "loader":
        return f"SIGKILL of the loader of {victim}"
    return f"SIGKILL of {victim} in {place}"
