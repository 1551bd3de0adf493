"""`stats`: numbers from indexes and plans, samples to look at, in one file that needs nothing
else."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.rejections import read_rejections
from data_tools.statistics import collect_statistics
from megatron_vita.config import load_recipe
from megatron_vita.report import charts
from megatron_vita.report.charts import histogram, stacked_bar
from megatron_vita.text.vocabulary import open_tokenizer
from tests.data_tools.toy_jsonl import train_tokenizer, write_shards, write_world


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Twelve samples, the second dataset the same with half the ratio, a plan of the first."""
    write_world(tmp_path)
    train_tokenizer(tmp_path)
    write_shards(tmp_path, "--samples-per-shard", "5")
    recipe = tmp_path / "recipe.yaml"
    second = f"{{name: again, shards: '{tmp_path}/toy/*.tar', ratio: 0.5, cap: 4}}"
    recipe.write_text(recipe.read_text().replace("/*.tar'}]", f"/*.tar'}}, {second}]"))
    assert main(["index", str(recipe)]) == 0
    return recipe


def test_numbers_are_those_of_the_samples(recipe: Path) -> None:
    loaded = load_recipe(recipe, [])
    first, again = collect_statistics(loaded, open_tokenizer(loaded)).datasets
    assert (first.samples, first.taken, again.samples, again.taken) == (12, 12, 12, 4)
    assert first.images.tolist() == [1] * 12
    assert first.tiles.tolist() == [4 + 1, 2 + 1] * 6
    tokenizer = open_tokenizer(loaded)
    answers = [f"It is number {i}, no doubt about it.<|im_end|>\n" for i in range(12)]
    assert first.loss_tokens.tolist() == [
        len(tokenizer.encode(answer.replace("<|im_end|>", ""))) + 1 for answer in answers
    ]
    assert again.epoch_tokens == pytest.approx(first.tokens.mean() * 4)


def test_images_with_more_pixels_than_their_tiles_are_counted(recipe: Path) -> None:
    """Images of 56 x 56 and 112 x 56 pixels, with tiles of 28."""
    for most, share in ((8, 0.0), (7, 0.5), (1, 1.0)):
        loaded = load_recipe(recipe, [f"media.max_tiles={most}"])
        first, _ = collect_statistics(loaded, open_tokenizer(loaded)).datasets
        assert first.downscaled == share


def test_what_import_and_shard_rejected_is_told_by_reason(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number in (1, 4, 7):
        records[number]["images"] = [f"gone{number}.png"]
    records[9] = {"nothing": "known"}
    (tmp_path / "records.json").write_text(json.dumps(records))
    path = tmp_path / "imported.jsonl"
    arguments = ["--media", f"{tmp_path}/media", "--workers", "0"]
    assert (
        main(["import", "llava", f"{tmp_path}/records.json", "--out", str(path), *arguments]) == 0
    )
    (tmp_path / "media/2.png").write_bytes(b"no picture")
    assert main(["shard", str(path), "--out", f"{tmp_path}/toy", *arguments]) == 0
    found = read_rejections(list((tmp_path / "toy").glob("*.tar")))
    assert (found.total, [count for _, count, _ in found.reasons]) == (5, [3, 1, 1])
    reason, _, example = found.reasons[0]
    assert reason.startswith("import: images[…] …: cannot read …")
    assert f"{tmp_path}/records.json object 2: images[0] gone1.png" in example
    assert sorted(kind.partition(":")[0] for kind, *_ in found.reasons) == [
        "import",
        "import",
        "shard",
    ]


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([64, 120], ["64", "72", "80", "88", "96", "104", "112", "120", "128"]),
        ([64, 300], ["64", "96", "128", "192", "256", "384", "512"]),
        ([1, 1000], ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1K"][::2]),
    ],
)
def test_marks_of_doubling_axes_are_round(values: list[int], marks: list[str]) -> None:
    svg = ElementTree.fromstring(histogram(np.array(values), unit="tokens", log=True))
    assert [text.text for text in svg.findall("text")][1:] == marks


@pytest.mark.parametrize("most", [7, 60, 130, 1234])
def test_bins_of_even_axes_are_one_two_or_five_wide(most: int) -> None:
    width = np.diff(charts._even_edges(np.array([0, most]), None))[0]
    assert str(width).rstrip("0") in ("1", "2", "5")


def test_the_plan_s_numbers_are_the_plan_s(recipe: Path) -> None:
    assert main(["plan", str(recipe)]) == 0
    loaded = load_recipe(recipe, [])
    found = collect_statistics(loaded, open_tokenizer(loaded))
    (plan,) = found.plans
    assert sum(plan.documents) == 16
    assert plan.tokens == sum(plan.shares.values()) == pytest.approx(256 * plan.fill.sum())
    assert set(plan.shares) == {"toy", "again"}


def test_packs_of_datasets_that_are_gone_are_no_dataset_s_share(recipe: Path) -> None:
    assert main(["plan", str(recipe)]) == 0
    again = f"data.train=[{{name: again, shards: '{recipe.parent}/toy/*.tar'}}]"
    assert main(["plan", str(recipe), again, "--continue-from", "2"]) == 0
    loaded = load_recipe(recipe, [again])
    (plan,) = collect_statistics(loaded, open_tokenizer(loaded)).plans
    assert set(plan.shares) == {"again"}
    assert 0 < plan.shares["again"] < plan.tokens
    assert main(["stats", str(recipe), again, "--out", str(recipe.parent / "stats.html")]) == 0


def test_the_page_needs_nothing_else_and_shows_samples(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe)]) == 0
    out = recipe.parent / "pages/stats.html"
    assert main(["stats", str(recipe), "--out", str(out), "--samples", "2"]) == 0
    assert "2 datasets, 1 plan" in capsys.readouterr().out
    page = out.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/jpeg;base64,") == 4
    assert "It is number 3, no doubt about it." in page
    assert "Plan: train" in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def test_a_sample_that_cannot_be_read_says_why(recipe: Path) -> None:
    for shard in (recipe.parent / "toy").glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x89PMG"))
    out = recipe.parent / "stats.html"
    assert main(["stats", str(recipe), "--out", str(out), "--samples", "1"]) == 0
    assert "cannot read this image" in out.read_text()


def test_what_samples_say_is_not_taken_for_html(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=1)
    path.write_text(path.read_text().replace("Which number", "<script>alert(1)<\\/script> Which"))
    train_tokenizer(tmp_path, vocab_size=310)
    write_shards(tmp_path)
    assert main(["index", str(tmp_path / "recipe.yaml")]) == 0
    assert (
        main(["stats", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "stats.html")]) == 0
    )
    page = (tmp_path / "stats.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_without_an_index_stats_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    train_tokenizer(tmp_path)
    write_shards(tmp_path)
    assert main(["stats", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "x.html")]) == 1
    assert "vita data index" in capsys.readouterr().err


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[0], [1], [0, 0, 5], list(range(1000)), [1, 1_000_000], [4096] * 3, [0.2, 0.9]]
)
def test_each_value_is_counted_once_in_a_histogram(values: list[float], log: bool) -> None:
    svg = histogram(np.array(values), unit="things", log=log)
    assert sum(
        int(count.replace(",", "")) for count in re.findall(r"things: ([\d,]+)", svg)
    ) == len(values)
    edges = [mark.text for mark in ElementTree.fromstring(svg).iter("text")]
    assert 2 <= len(edges) <= 10


def test_charts_of_nothing_are_drawn() -> None:
    assert "none" in histogram(np.zeros(0), unit="things")
    assert "0.0%" in stacked_bar({"a": 0.0}, ["red"])


def test_a_dataset_without_samples_is_shown_as_such(recipe: Path) -> None:
    for shard in (recipe.parent / "toy").glob("*.tar"):
        shard.write_bytes(bytes(10240))
    assert main(["index", str(recipe)]) == 0
    assert main(["stats", str(recipe), "--out", str(recipe.parent / "stats.html")]) == 0
    assert '<p class="none">none</p>' in (recipe.parent / "stats.html").read_text()
