"""The page of runs shows what their folders hold, and says what they do not."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_vita.errors import DataError
from megatron_vita.report.__main__ import main, spread_evenly
from megatron_vita.report.lines import HEAD, HEIGHT, Mark, Series, line_chart, number
from megatron_vita.report.reading import read_run
from megatron_vita.report.runs import write_report


def write_run(folder: Path, *, steps: int = 6, **more: Any) -> Path:
    """A run that was killed after step 4, went on from step 2, and has done all steps."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0, "time": 0.0}]
    for step in [1, 2, 3, 4, 3, *range(4, steps + 1)]:
        if step == 3 and rows[-1]["step"] == 4:
            rows.append({"event": "start", "step": 2, "time": 60.0, "host": "node<7>"})
        row = {"event": "step", "step": step, "time": rows[-1]["time"] + 6}
        row |= {"train/loss": 8.0 / step, "train/loss/cats": 4.0, "train/loss/dogs": 2.0}
        row |= {"speed/step_seconds": 2.0, "speed/data_seconds": 0.5, "data/damaged": step == 5}
        rows.append(row | {"speed/tokens_per_second": 50.0, "mine/accuracy": 0.75} | more)
    rows.append({"event": "validation", "step": steps, "time": 99.0, "validation/loss": 1.25})
    rows.append({"event": "end", "step": steps, "time": 100.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(f"training: {{train_iters: {steps}}}\n")
    (folder / "damaged").mkdir()
    damage = {"pack": 3, "shard": "a.tar", "key": "k<1>", "reason": "truncated"}
    (folder / "damaged" / "replica_00000.jsonl").write_text(json.dumps(damage) + "\n")
    return folder


def page_of(*folders: Path) -> str:
    out = folders[0].parent / "report.html"
    assert main([*map(str, folders), "--out", str(out), "--packs", "0"]) == 0
    return out.read_text()


def cell_after(page: str, name: str) -> str:
    """The card's number above `name`."""
    found = re.search(rf"<b>([^<]*)</b><span>{re.escape(name)}</span>", page)
    assert found, name
    return found[1]


def test_a_page_needs_nothing_else_and_shows_each_step_once(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "runs" / "cats"))
    assert not re.search(r"(src|href)=.(?!data:)|<script|@import|url\(", page)
    cards = {
        "state": "done",
        "steps": "6 of 6",
        "tokens": "600",  # 6 steps of 2 s at 50 a second
        "waiting for data": "25.0%",
        "damaged samples": "1",
        "lowest validation loss": "1.25",
        "starts": "2",
    }
    assert {name: cell_after(page, name) for name in cards} == cards
    for heading in ("Loss by source", "Recorded", "Damaged samples", "Starts"):
        assert f"<h2>{heading}</h2>" in page
    for cell in ("1 to 4", "killed", "2 steps", "3 to 6", "node&lt;7&gt;", "k&lt;1&gt;"):
        assert f"<td>{cell}</td>" in page


def test_several_runs_stand_side_by_side_with_what_their_recipes_differ_in(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a" / "one"), write_run(tmp_path / "b" / "two", steps=8)]
    page = page_of(*folders)
    for name in ("a/one", "b/two"):
        assert page.count(name) > 5
    row = r"<td>training.train_iters</td><td><code>6</code></td><td><code>8</code></td>"
    assert re.search(row, page)
    # a chart a source, with both runs in it
    for source in ("cats", "dogs"):
        chart = page.split(f"<figcaption>{source}</figcaption>")[1].split("</figure>")[0]
        assert chart.count("<polyline") == 2


def test_a_run_of_one_step_and_one_without_any_are_shown(tmp_path: Path) -> None:
    lines = [{"event": "start", "step": 0, "time": 1.0}]
    for name in ("none", "one"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines.append({"event": "step", "step": 1, "time": 2.0, "train/loss": 3.0})
    page = page_of(tmp_path / "none", tmp_path / "one")
    assert "running or killed" in page
    assert page.count("<circle") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: No such file or directory: a run's folder is needed"),
        ("", "metrics.jsonl: no whole line in it yet"),
        ('{"event": "st', "metrics.jsonl: no whole line in it yet"),
    ],
)
def test_a_folder_that_is_no_runs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_pictures_that_cannot_be_made_say_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text("text: {tokenizer: nowhere.model}\n")
    out = tmp_path / "page.html"
    assert main([str(folder), "--out", str(out)]) == 0
    page = out.read_text()
    for step, pack in ((1, 1), (6, 41)):  # steps of 8 packs
        assert re.search(rf"step {step}, pack {pack}: .*nowhere.model", page)


@pytest.mark.parametrize(
    ("last", "count", "numbers"),
    [
        (100, 4, [1, 34, 67, 100]),
        (3, 4, [1, 2, 3]),
        (7, 1, [1]),
        (7, 0, []),
        (0, 4, []),
        (1, 2, [1]),
    ],
)
def test_packs_are_shown_from_the_first_step_to_the_last(
    last: int, count: int, numbers: list[int]
) -> None:
    assert spread_evenly(last, count) == numbers


def test_every_chart_marks_the_restarts_of_its_runs(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=8))
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) > 4
    for chart in charts:
        titles = re.findall(r'<line class="mark".*?<title>(.*?)</title>', chart)
        # at the only step of a chart's axis there is none
        if chart.count("<circle") < 2:
            assert [title.partition(": ")[2] for title in titles] == ["restarted after step 2"] * 2


def test_a_mark_stands_at_its_step_and_none_off_the_axis() -> None:
    line = Series(name="a", color="red", points=[(1, 2.0), (3, 4.0), (5, 3.0)])
    marks = [Mark(step=step, color="gray", text=f"<{step}>") for step in (3, 9)]
    chart = line_chart([line], marks=marks)
    (mark,) = re.findall(r'<line class="mark" stroke="gray" x1="([\d.]+)" x2="\1"', chart)
    assert float(mark) == places(chart, "line")[1][0]
    assert "&lt;3&gt;" in chart
    assert "&lt;9&gt;" not in chart


def places(chart: str, kind: str) -> list[tuple[float, float]]:
    """Pixels of a chart's line."""
    svg = ElementTree.fromstring(chart.split("</svg>")[0] + "</svg>")
    (line,) = [node for node in svg.iter("polyline") if node.get("class") == kind]
    pairs = [pair.split(",") for pair in line.get("points", "").split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_rises_where_its_values_do_and_reaches_both_ends() -> None:
    chart = line_chart([Series(name="a", color="red", points=[(1, 2.0), (3, 4.0), (5, 3.0)])])
    (x1, y1), (x2, y2), (x3, y3) = places(chart, "line")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.2)  # pixels count downwards
    assert HEAD <= y2 < y1 <= HEAD + HEIGHT


def test_one_value_far_off_neither_flattens_a_line_nor_draws_it_along() -> None:
    points = [(step, 1.0 + 0.1 * (step % 2)) for step in range(1000)]
    points[500] = (500, 1e9)
    chart = line_chart([Series(name="a", color="red", points=points)])
    heights = [y for _, y in places(chart, "line")]
    assert max(heights) - min(heights) < HEIGHT / 2
    assert len(heights) <= 260
    assert "nan" not in chart


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0] * 100, [-3.0, -3.0, -1.0], [1e-9, 2e-9]])
def test_flat_negative_and_tiny_values_have_an_axis(values: list[float]) -> None:
    for from_zero in (False, True):
        line = Series(name="a", color="red", points=list(enumerate(values)))
        chart = line_chart([line], from_zero=from_zero)
        assert chart.count('class="grid"') >= 2
        assert not re.search(r"nan|inf", chart)


def test_numbers_are_short() -> None:
    shown = [number(value) for value in (0.00012347, 12.0, 340, 12_345, 75_570_000, 3e9)]
    assert shown == ["0.0001235", "12", "340", "12.35K", "75.57M", "3G"]


def test_write_report_makes_the_folder_of_the_page(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run"))
    write_report([record], tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
