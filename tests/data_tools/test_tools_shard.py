"""`shard`: bad samples are listed or stop it, by file and line; an interrupted run goes on to the
same bytes."""

import base64
import io
import json
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools import sharding
from data_tools.cli import main
from data_tools.reading.lines import Line
from megatron_vita.errors import DataError
from tests.data_tools.toy_jsonl import sample, write_world
from tests.forked import run_program, start_program


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((20, 10), 80).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
BESIDE = (
    "index.parquet",
    "0123456789ab.index.parquet",
    "quarantine.json",
    "index.parquet.0a1b.partial",
)
BAD = {
    "malformed JSON": ('{"messages": [', "not JSON"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "missing image": (json.dumps(sample(0) | {"images": ["none.png"]}), "cannot read"),
    "outside image": (
        json.dumps(sample(0) | {"images": ["../toy.jsonl"]}),
        "outside the media folder",
    ),
    "truncated JPEG": (json.dumps(sample(0) | {"images": ["cut.jpg"]}), "truncated"),
    "tag count": (
        json.dumps(sample(0) | {"images": []}),
        "1 places for images (<image>) and images lists 0",
    ),
    "empty conversation": (json.dumps({"messages": []}), "messages is an empty list"),
    "unknown medium": (json.dumps(sample(0) | {"mask": "1.png"}), "mask is '1.png', which looks"),
    "key twice": (
        '{"images": ["0.png"], "images": [], "messages": []}',
        "the key images occurs twice",
    ),
    "tool calls": (
        json.dumps(
            {"messages": [*sample(0)["messages"], {"role": "assistant", "tool_calls": [1]}]}
        ),
        "tool_calls is [1]: tool calls are not trained",
    ),
    "preference": (
        json.dumps(sample(0) | {"rejected_response": ["No."]}),
        "rejected_response is ['No.']",
    ),
    "path is no text": (json.dumps(sample(0) | {"images": [7]}), "images[0] is 7"),
    "broken video": (
        json.dumps(
            {
                "messages": [{"role": "user", "content": "<video>"}, *sample(0)["messages"][1:]],
                "videos": ["no.mp4"],
            }
        ),
        "videos[0] no.mp4",
    ),
}


def shard(path: Path, *options: str) -> int:
    return main(
        [
            "shard",
            str(path),
            "--media",
            str(path.parent / "media"),
            "--out",
            str(path.parent / "toy"),
            *options,
        ]
    )


def tars(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "toy").glob("*.tar"))}


def insert_bad(path: Path, text: str) -> None:
    image = path.parent / "media/cut.jpg"
    Image.effect_noise((200, 200), 80).save(image)
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    (path.parent / "media/no.mp4").write_bytes(b"no video")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], text + "\n", *lines[4:]]))


QUESTION = {"role": "user", "content": "Which?"}
ANSWER = {"role": "assistant", "content": "0."}
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "0.png"},
        {"images": None, "image_path": ["0.png"]},
        {"file_name": "0.png"},
        {"images": [{"bytes": None, "path": "0.png"}], "coco_url": "https://x.org/0.jpg"},
        {"images": [URL]},
        {"messages": [QUESTION | {"image": "0.png"}, ANSWER]},
        {"messages": [QUESTION | {"content": [{"type": "image", "image": "0.png"}]}, ANSWER]},
        {"messages": None, "conversations": [QUESTION, ANSWER], "image": "0.png"},
    ],
)
def test_media_under_other_names_are_stored_with_a_place(tmp_path: Path, fields: dict) -> None:
    path = write_world(tmp_path, count=1)
    (tmp_path / "media/0.png").write_bytes(PNG)
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]} | fields))
    assert shard(path, "--workers", "0") == 0
    with tarfile.open(tmp_path / "toy/toy-000000.tar") as tar:
        stored = {name: tar.extractfile(name).read() for name in tar.getnames()}
    record = json.loads(stored["toy-00000001.json"])
    assert stored[record["images"][0]] == PNG
    assert "image" in str(record["messages"][0]["content"])


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_sample_is_listed_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    path = write_world(tmp_path)
    text, reason = BAD[bad]
    insert_bad(path, text)
    assert shard(path, "--samples-per-shard", "5") == 0
    assert "12 samples; 1 rejected" in capsys.readouterr().out
    (entry,) = map(json.loads, (tmp_path / "toy/rejected.jsonl").read_text().splitlines())
    assert (entry["file"], entry["line"]) == (str(path), 5)
    assert reason in entry["reason"]
    assert len(tars(tmp_path)) == 3


def test_nothing_but_bad_samples_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path)
    path.write_text("{\n[]\n")
    assert shard(path) == 1
    assert (
        f"toy: 0 samples; 2 rejected, listed in {tmp_path / 'toy/rejected.jsonl'}"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("bad", BAD)
def test_strict_stops_at_a_bad_sample_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    path = write_world(tmp_path)
    text, reason = BAD[bad]
    insert_bad(path, text)
    assert shard(path, "--samples-per-shard", "3", "--strict", "--workers", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}:5: ")
    assert reason in error
    assert list(tars(tmp_path)) == ["toy-000000.tar"]


def test_strict_also_stops_at_a_sample_that_an_earlier_run_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path)
    insert_bad(path, "{")
    assert shard(path) == 0
    assert shard(path, "--strict") == 1
    assert f"error: {path}:5: not JSON" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_world(tmp_path / "a")
    path = write_world(tmp_path / "b")
    for world in (whole, path):
        insert_bad(world, "{")
    assert shard(whole, "--samples-per-shard", "3") == 0
    check = sharding.check_line
    seen = []

    def failing(line: Line, **how: Any) -> Any:
        seen.append(line.number)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return check(line, **how)

    monkeypatch.setattr(sharding, "check_line", failing)
    assert shard(path, "--samples-per-shard", "3", "--workers", "0") == 130
    assert list(tars(tmp_path / "b")) == ["toy-000000.tar", "toy-000001.tar"]
    with open(tmp_path / "b/toy/progress.jsonl", "a") as file:
        file.write('{"part": 2, "res')
    assert shard(path, "--samples-per-shard", "3", "--workers", "0") == 0
    assert seen[8:] == list(range(7, 14))
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    rejected = [json.loads((tmp_path / name / "toy/rejected.jsonl").read_text()) for name in "ab"]
    assert [entry["line"] for entry in rejected] == [5, 5]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=400)
    command = [
        "-m",
        "data_tools",
        "shard",
        str(path),
        "--media",
        str(tmp_path / "media"),
    ]
    command += ["--out", str(tmp_path / "toy"), "--samples-per-shard", "4"]
    run = start_program(*command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("toy/toy-000003.tar")) and time.monotonic() < deadline:
        time.sleep(0.001)
    run.kill()
    run.wait()
    entries = map(json.loads, (tmp_path / "toy/progress.jsonl").read_text().splitlines()[1:-1])
    shards = [tmp_path / f"toy/toy-{entry['part']:06d}.tar" for entry in entries]
    finished = {path: path.stat().st_mtime_ns for path in shards}
    assert shard(path, "--samples-per-shard", "4") == 0
    assert len(tars(tmp_path)) == 100
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list((tmp_path / "toy").glob("*.partial"))


def test_a_folder_of_other_inputs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path)
    assert shard(path, "--samples-per-shard", "5") == 0
    assert shard(path, "--samples-per-shard", "6") == 1
    assert "another samples_per_shard (5, now 6)" in capsys.readouterr().err
    path.write_text(path.read_text() + json.dumps(sample(3)) + "\n")
    assert shard(path, "--samples-per-shard", "5") == 1
    assert "another files" in capsys.readouterr().err


def job(root: Path, **options: Any) -> sharding.ShardJob:
    """The work on the world under `root`, by the library."""
    usual = {"samples_per_shard": 6, "strict": False}
    files = [root / "toy.jsonl"]
    media = root / "media"
    return sharding.ShardJob(files=files, media_root=media, out=root / "toy", **(usual | options))


def names(root: Path) -> list[str]:
    return sorted(
        path.name for path in (root / "toy").iterdir() if path.suffix not in (".json", ".jsonl")
    )


def test_tars_of_a_part_that_fails_leave_nothing_behind(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match=r"toy\.jsonl:13"):
        sharding.make_shards(job(tmp_path, strict=True, max_bytes=500, samples_per_shard=20))
    assert names(tmp_path) == []


def test_a_part_that_is_killed_leaves_no_tar_and_the_next_run_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path)
    monkeypatch.setattr(sharding._Tars, "__exit__", lambda *_: None)
    sharding.make_shards(job(tmp_path, max_bytes=500, samples_per_shard=20))
    assert names(tmp_path)
    assert not tars(tmp_path)
    monkeypatch.undo()
    (tmp_path / "toy/progress.jsonl").unlink()
    sharding.make_shards(job(tmp_path))
    assert names(tmp_path) == ["toy-000000.tar", "toy-000001.tar"]


def test_tars_that_earlier_work_left_are_removed_with_what_lies_beside_them(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    sharding.make_shards(job(tmp_path, max_bytes=500, samples_per_shard=4))
    assert {"toy-000000_1.tar", "toy-000002_1.tar"} <= set(names(tmp_path))
    beside = [f"toy-{stem}.{suffix}" for stem in ("000000_1", "000002") for suffix in BESIDE]
    others = [
        "toy-7.tar",
        "toy-000009_0.tar",
        "tot-000009.tar",
        "toy-000009.tar.gz",
        "toy-000009-old.tar",
    ]
    for name in (*beside, *others, *(f"toy-000000.{suffix}" for suffix in BESIDE)):
        (tmp_path / "toy" / name).touch()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    (tmp_path / "toy/progress.jsonl").unlink()
    sharding.make_shards(job(tmp_path, samples_per_shard=4))
    mine = [f"toy-000000.{suffix}" for suffix in BESIDE if not suffix.endswith("json")]
    assert names(tmp_path) == sorted([*mine, "toy-000000.tar", "toy-000001.tar", *others])
    assert (tmp_path / "toy/toy-000000.quarantine.json").exists()
    assert not (tmp_path / "toy/toy-000002.quarantine.json").exists()


def test_datasets_of_one_folder_must_have_the_same_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"messages": sample(0)["messages"]}) + "\n")

    def recipe(*lines: str) -> str:
        common = f"shards: '{tmp_path}/toy/*.tar', media: '{tmp_path}/media', ratio: 0.5"
        sets = [
            f"{{name: d{i}, jsonl: '{tmp_path}/{name}', {common}}}" for i, name in enumerate(lines)
        ]
        (tmp_path / "recipe.yaml").write_text(f"data: {{train: [{', '.join(sets)}]}}\n")
        return str(tmp_path / "recipe.yaml")

    assert main(["shard", recipe("toy.jsonl", "other.jsonl")]) == 1
    assert (
        f"dataset d1: its shards in {tmp_path}/toy are made of {tmp_path}/toy.jsonl"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "toy").exists()
    assert main(["shard", recipe("toy.jsonl", "toy.jsonl"), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/toy: 12 samples\n"


def test_files_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_world(tmp_path / "a")
    second = write_world(tmp_path / "b")
    assert main(["shard", str(first), str(second), "--out", str(tmp_path / "toy")]) == 1
    assert "must differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shard", "/no.jsonl", "--out", "/tmp/nowhere-toy"], "/no.jsonl: cannot read it"),
        (["shard", "x.jsonl", "--out", "x", "--media", "/no"], "--media /no is not a folder"),
        (["shard", "x.jsonl"], "--out is needed"),
        (["shard", "x.yaml", "--out", "x"], "a recipe's datasets name their folders"),
        (["shard", "x.jsonl", "--out", "x", "--max-shard-mb", "-1"], "--max-shard-mb is -1"),
        (
            ["shard", "x.jsonl", "--out", "x", "--samples-per-shard", "0"],
            "--samples-per-shard is 0",
        ),
        (["index", "/no.yaml"], "/no.yaml: cannot read the recipe"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_user_errors_are_one_line_and_code_1(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_command_line_gives_its_code_and_no_traceback(tmp_path: Path) -> None:
    run = run_program("-m", "data_tools", "plan", str(tmp_path / "none.yaml"))
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ")
