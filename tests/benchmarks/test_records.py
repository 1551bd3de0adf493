"""The records in docs/performance.md are those of the files."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import records


def test_the_page_shows_all_records() -> None:
    page = records.PAGE.read_text()
    written = records.with_table(page, records.table(records.training_results()))
    assert page == written, "run: PYTHONPATH=. python benchmarks/records.py --write"


def test_a_table_is_replaced_and_the_rest_stays() -> None:
    start, end = records.MARKS
    page = f"before\n{start}\nold\n{end}after\n"
    assert records.with_table(page, "new") == f"before\n{start}\nnew\n{end}after\n"
    for mark in (start, end):
        with pytest.raises(ValueError, match="has no line"):
            records.with_table(page.replace(mark, ""), "new")
