"""The layouts that recipes take by name are those of docs/layouts.md."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_vita.config import Recipe, load_recipe
from megatron_vita.config.named_layouts import known_layouts
from megatron_vita.costs.fitting import Room, memory_need

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import layouts

ROW = re.compile(r"\| (\d) \| (\d+) \| ([^|]+) \| ([^|]*) \| (\d+) \|")
SIZE = re.compile(r"## (\w+) on (\w+), .*")


class Row(NamedTuple):
    """A row of the page with a layout."""

    name: str
    size: str
    stage: int
    gpus: int
    sizes: str
    levers: str
    device_gib: int


def rows() -> Iterator[Row]:
    size = device = None
    for line in layouts.PAGE.read_text(encoding="utf-8").splitlines():
        if head := SIZE.fullmatch(line):
            size = head.group(1).lower()
            device = next(known for known in layouts.DEVICES if known.name == head.group(2))
        if row := ROW.match(line):
            stage, gpus = int(row.group(1)), int(row.group(2))
            name = layouts.layout_name(size, stage, gpus, device)
            yield Row(name, size, stage, gpus, row.group(3), row.group(4), int(row.group(5)))


ROWS = list(rows())


def taken(row: Row) -> Recipe:
    """The recipe of a row with its layout, as a run takes it."""
    return load_recipe(layouts.recipe_file(row.size, row.stage), [f"parallel.layout={row.name}"])


def test_every_row_of_the_page_has_its_name_and_no_other_has() -> None:
    assert {row.name for row in ROWS} == set(known_layouts())


@pytest.mark.parametrize("size", layouts.SIZES)
def test_a_recipe_with_a_named_layout_is_the_one_of_the_page(size: str) -> None:
    for row in ROWS[:: 1 if size == "7b" else 3]:
        if row.size == size:
            recipe = taken(row)
            assert layouts.sizes_of(recipe, row.gpus) == row.sizes, row.name
            assert (", ".join(layouts.levers(recipe)) or "none") == row.levers, row.name
            recipe.data_parallel_size(row.gpus)


@pytest.mark.parametrize("name", ["7b-stage3-8x80", "14b-stage2-16x141", "72b-stage4-64x141"])
def test_a_named_layout_takes_the_memory_that_the_page_says(name: str) -> None:
    row = next(row for row in ROWS if row.name == name)
    recipe = taken(row)
    need = memory_need(recipe, data_parallel=recipe.data_parallel_size(row.gpus))
    assert need.device / layouts.GIB == pytest.approx(row.device_gib, abs=0.51)
    device = next(d for d in layouts.DEVICES if name.endswith(str(layouts.MEMORY[d.name])))
    assert need.fits_device(Room(device=int(device.memory_gib * layouts.GIB), host=0))
