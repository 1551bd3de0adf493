"""Hostile inputs: each ends as used or as listed with a reason; no tool hangs, crashes or leaks."""

import io
import json
import random
import re
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.cli import main
from data_tools.reading.lines import read_lines
from data_tools.reading.samples import check_line
from data_tools.workers.pool import FAULT
from megatron_vita.config import load_recipe
from megatron_vita.data.loading.open import open_split
from megatron_vita.data.shards.index import read_index
from megatron_vita.data.shards.quarantine import read_quarantine
from megatron_vita.data.shards.tar import scan_shard
from megatron_vita.errors import DataError
from megatron_vita.text.vocabulary import open_tokenizer
from tests.data_tools.fuzz import odd_texts, tars, write_lines, write_tars
from tests.data_tools.fuzz_media import damaged, images, videos
from tests.data_tools.toy_jsonl import train_tokenizer, write_world
from tests.indexes import index_of
from tests.scale import scaled

WHOLE = scaled(False, full=True)
LINES = scaled(60, full=1500)
TARS = scaled(20, full=700)
SEED = 20261125
WORST = re.compile(f"time limit|ended the process|{FAULT}")
QUICK = ("--workers", "2", "--time-limit", "30")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tokenizer and a recipe for shards in `toy`."""
    write_world(tmp_path)
    train_tokenizer(tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("seq_length: 256", "seq_length: 4096"))
    return tmp_path


def read_all(recipe_path: Path) -> int:
    """Plans the shards and reads every pack as training does; gives the number of documents."""
    assert main(["plan", str(recipe_path)]) == 0
    recipe = load_recipe(recipe_path, [])
    stream = open_split(recipe, split="train", tokenizer=open_tokenizer(recipe), tile_share=(0, 1))
    return sum(len(stream[pack].sample_keys) for pack in range(len(stream)))


def test_each_line_ends_in_a_shard_or_in_the_list(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(root / "lines.jsonl", root / "odd", count=LINES, seed=SEED, huge=WHOLE)
    begun = time.monotonic()
    arguments = [
        "shard",
        str(root / "lines.jsonl"),
        "--media",
        str(root / "odd"),
        "--out",
        str(root / "toy"),
        *QUICK,
    ]
    assert main([*arguments, "--samples-per-shard", "40"]) == 0
    shards = sorted((root / "toy").glob("*.tar"))
    used = {int(sample.key[-8:]) for shard in shards for sample in scan_shard(shard)}
    entries = [json.loads(line) for line in (root / "toy/rejected.jsonl").read_text().splitlines()]
    listed = {entry["line"] for entry in entries}
    assert len(used) + len(listed) == lines
    assert not used & listed
    assert all(entry["reason"] for entry in entries)
    assert len(used) > 20
    assert not [entry for entry in entries if WORST.search(entry["reason"])]
    assert main(["index", str(root / "recipe.yaml"), *QUICK]) == 0
    code = main(["validate", str(root / "recipe.yaml"), *QUICK])
    bad = sum(len(read_quarantine(shard).entries) for shard in shards)
    assert code == bool(bad)
    assert main(["index", str(root / "recipe.yaml"), *QUICK]) == 0
    assert sum(len(read_index(index_of(shard))) for shard in shards) + bad == len(used)
    assert read_all(root / "recipe.yaml") > 0
    seconds = time.monotonic() - begun
    print(f"{lines} lines: {len(used)} used, {len(listed)} listed, {seconds:.0f} s")  # noqa: T201


def test_each_sample_of_a_tar_ends_in_the_index_or_in_the_list(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_tars(root / "toy", count=TARS, seed=SEED)
    begun = time.monotonic()
    recipe = str(root / "recipe.yaml")
    assert main(["index", recipe, *QUICK]) == 0
    main(["validate", recipe, *QUICK])
    assert main(["index", recipe, *QUICK]) == 0
    used = listed = 0
    for path in paths:
        entries = read_quarantine(path).entries
        assert all(entry.reason and not WORST.search(entry.reason) for entry in entries)
        indexed = set(read_index(index_of(path)).keys())
        alone = [entry for entry in entries if not entry.reason.endswith("has the same key")]
        assert not indexed & {entry.key for entry in alone if entry.by == "validate"}
        used = used + len(indexed)
        listed = listed + len({(entry.key, entry.reason) for entry in entries})
    assert used > len(paths) / 2
    assert read_all(root / "recipe.yaml") > 0
    out = ["--out", str(root / "found.jsonl"), "--media-out", str(root / "found")]
    assert main(["import", "webdataset", str(root / "toy"), *out, *QUICK]) == 0
    outside = [
        path
        for path in (root / "found").rglob("*")
        if not path.resolve().is_relative_to(root / "found")
    ]
    assert not outside
    print(f"{len(paths)} tars: {used} used, {listed} listed, {time.monotonic() - begun:.0f} s")  # noqa: T201


def hostile_sources(folder: Path, format: str, count: int) -> int:
    """Damaged files of a format, and one of odd lines; gives the number of these."""
    folder.mkdir()
    dice = random.Random(format)
    texts = [text for text in odd_texts(dice, huge=WHOLE) if b"\n" not in text and text.strip()]
    turns = [{"from": "human", "value": "<image>\nHm?"}, {"from": "gpt", "value": "Yes."}]
    if format != "hf":
        (folder / "lines.jsonl").write_bytes(b"\n".join(texts))
        whole = json.dumps([{"image": "0.png", "conversations": turns}] * 20).encode()
        for i in range(count):
            (folder / f"{i}.json").write_bytes(damaged(whole, dice))
        return len(texts)
    image = {"bytes": images()["plain"][1], "path": "0.png"}
    table = pa.Table.from_pylist(
        [{"image": image, "conversations": turns, "id": i} for i in range(20)]
    )
    file = io.BytesIO()
    stream = io.BytesIO()
    pq.write_table(table, file)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    for i in range(count):
        if i % 2:
            name, data = (f"{i}.parquet", file.getvalue())
        else:
            name, data = (f"{i}.arrow", stream.getvalue())
        (folder / name).write_bytes(damaged(data, dice))
    return 0


@pytest.mark.parametrize("format", ["llava", "sharegpt", "hf"])
def test_hostile_sources_are_imported_as_far_as_they_can_be_read(root: Path, format: str) -> None:
    lines = hostile_sources(root / "sources", format, count=scaled(15, full=150))
    (root / "media/0.png").write_bytes(images()["plain"][1])
    out = [
        "--out",
        str(root / "out.jsonl"),
        "--media",
        str(root / "media"),
        "--media-out",
        str(root / "found"),
    ]
    assert main(["import", format, str(root / "sources"), *out, *QUICK]) == 0
    entries = [json.loads(line) for line in (root / "out.rejected.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (root / "out.jsonl").read_text().splitlines()]
    assert all(entry["reason"] and FAULT not in entry["reason"] for entry in entries)
    assert len(samples) > 20
    of_lines = [entry for entry in entries if entry["source"].endswith("lines.jsonl")]
    assert 0 < len(of_lines) <= lines or format == "hf"
    media = root / ("found" if format == "hf" else "media")
    assert (
        main(
            [
                "shard",
                str(root / "out.jsonl"),
                "--media",
                str(media),
                "--out",
                str(root / "toy"),
                *QUICK,
            ]
        )
        == 0
    )


def test_checking_the_same_inputs_again_takes_no_more_memory(root: Path) -> None:
    write_lines(root / "lines.jsonl", root / "odd", count=60, seed=SEED + 1, huge=False)
    found = [line for line in read_lines([root / "lines.jsonl"]) if len(line.text) < 100_000]
    sizes = []
    for _ in range(scaled(4, full=8)):
        for line in found:
            try:
                check_line(line, media_root=root / "odd")
            except DataError:
                continue
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[1] < 40 << 20


def test_the_same_seed_gives_the_same_inputs() -> None:
    assert list(tars(10, 3)) == list(tars(10, 3))
    assert list(tars(10, 3)) != list(tars(10, 4))


def test_the_odd_media_are_used_or_not_as_they_should_be(tmp_path: Path) -> None:
    """Covers media for which the expected result is clear: a decoder must use or refuse them."""
    refused = {
        "image": {
            "30,000 square, not there",
            "largest size",
            "no size",
            "portable of any size",
            "tga",
            "program",
            "floats that are no numbers",
        }
        | {"empty", "text", "html", "svg", "zeros", "bomb"},
        "video": {
            "sound alone",
            "no index",
            "empty",
            "text",
            "no frames",
            "frames that are none",
            "frames at no rate",
        }
        | {"frames, zip bomb", "playlist", "list of files"},
    }
    for kind, files in (("image", images()), ("video", videos())):
        for i, (name, (suffix, data)) in enumerate(files.items()):
            (tmp_path / f"{kind}{i}{suffix}").write_bytes(data)
            turns = [
                {"role": "user", "content": f"<{kind}>"},
                {"role": "assistant", "content": "Yes."},
            ]
            text = json.dumps({"messages": turns, f"{kind}s": [f"{kind}{i}{suffix}"]})
            (tmp_path / "one.jsonl").write_text(text)
            (line,) = read_lines([tmp_path / "one.jsonl"])
            try:
                check_line(line, media_root=tmp_path)
                used = True
            except DataError:
                used = False
            assert used == (name not in refused[kind]), name
