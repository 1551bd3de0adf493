"""`shard` by many workers, on one machine or a Ray cluster: the same bytes; what hangs or leads
outside is left out."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from data_tools.cli import main
from megatron_vita.media.video import VideoInfo, decode_frames, probe_video
from tests.data_tools.toy_jsonl import sample, write_world

SLOW_SIDE = 13000
SLOW_IMAGES = 50


def shard(root: Path, out: str, *options: str) -> dict[str, bytes]:
    """The shards and the list of rejections that come of the toy world."""
    arguments = [
        "shard",
        str(root / "toy.jsonl"),
        "--media",
        str(root / "media"),
        "--out",
        str(root / out / "toy"),
    ]
    assert main([*arguments, "--samples-per-shard", "3", *options]) == 0
    return {path.name: path.read_bytes() for path in (root / out / "toy").glob("[!p]*")}


def add(path: Path, **fields: Any) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(sample(0) | fields) + "\n")


def rejected(root: Path, out: str) -> list[str]:
    return [
        json.loads(line)["reason"]
        for line in (root / out / "toy/rejected.jsonl").read_text().splitlines()
    ]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=8)
    for i in range(12):
        add(path, images=[f"none{i}.png"] if i % 3 else ["0.png"])
    add(path, images=["none.png"])
    add(path)
    made = shard(tmp_path, "w0", "--workers", "0")
    assert len(made) == 10
    assert [reason.split()[1].rstrip(":") for reason in rejected(tmp_path, "w0")] == [
        *(f"none{i}.png" for i in range(12) if i % 3),
        "none.png",
    ]
    assert shard(tmp_path, "w1", "--workers", "1") == made
    assert shard(tmp_path, "w3", "--workers", "3") == made


def test_a_sample_that_takes_too_long_is_left_out_and_its_shard_is_whole(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=4)
    Image.new("L", (SLOW_SIDE, SLOW_SIDE)).save(tmp_path / "media/slow.png", compress_level=1)
    asked = {"role": "user", "content": "<image>" * SLOW_IMAGES}
    add(
        path,
        messages=[asked, {"role": "assistant", "content": "black"}],
        images=["slow.png"] * SLOW_IMAGES,
    )
    add(path)
    made = shard(tmp_path, "a", "--workers", "1", "--time-limit", "3")
    assert rejected(tmp_path, "a") == ["it took longer than the time limit of 3 s"]
    (tmp_path / "media/slow.png").write_bytes(b"")
    quick = shard(tmp_path, "b", "--workers", "1")
    assert {name: data for name, data in made.items() if name.endswith("tar")} == {
        name: data for name, data in quick.items() if name.endswith("tar")
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/hostname", "lies outside the media folder"),
        ("../toy.jsonl", "lies outside the media folder"),
        ("sub/../0.png", "lies outside the media folder"),
        ("link.png", "is a link to outside the media folder"),
        ("folder/toy.jsonl", "is a link to outside the media folder"),
        ("pipe.png", "is not a file"),
        ("", "a path under the media folder is needed"),
    ],
)
def test_paths_that_lead_outside_are_refused_by_name(
    tmp_path: Path, name: str, reason: str
) -> None:
    path = write_world(tmp_path, count=2)
    (tmp_path / "media/link.png").symlink_to(path)
    (tmp_path / "media/folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "media/pipe.png")
    add(path, images=[name])
    shard(tmp_path, "a", "--workers", "1")
    assert [reason in found for found in rejected(tmp_path, "a")] == [True]


def test_links_inside_the_media_folder_are_followed(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=2)
    (tmp_path / "media/link.png").symlink_to(tmp_path / "media/0.png")
    add(path, images=["link.png"])
    shard(tmp_path, "a", "--workers", "1")
    assert not rejected(tmp_path, "a")


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    write_world(tmp_path, count=7)
    shard(tmp_path, "a")
    urls = [str(path) for path in sorted((tmp_path / "a/toy").glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [one["json"]["messages"] for one in found] == [sample(i)["messages"] for i in range(7)]
    assert [one["image0.png"].getpixel((0, 0)) for one in found] == [
        (20 * i, 90, 160) for i in range(7)
    ]


@pytest.mark.full("installs megatron-energon")
def test_energon_prepares_the_shards(tmp_path: Path) -> None:
    write_world(tmp_path, count=7)
    shard(tmp_path, "a")
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (link,) = (tmp_path / "venv").glob("lib/*/site-packages")
    # torch need not be installed again
    (link / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "megatron-energon"], check=True)
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    energon = [
        str(python),
        str(python.with_name("energon")),
        "prepare",
        *options,
        str(tmp_path / "a/toy"),
    ]
    run = subprocess.run(energon, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (info,) = (tmp_path / "a/toy/.nv-meta").glob(".info.*")
    text = info.read_text()
    assert all(f"toy-00000{i}.tar" in text for i in range(3))
    assert (tmp_path / "a/toy/.nv-meta/index.sqlite").stat().st_size > 0


def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    path = write_world(tmp_path, count=10)
    add(path, images=["none.png"])
    made = shard(tmp_path, "here", "--workers", "0")
    ray.init("local", num_cpus=2, include_dashboard=False)
    try:
        assert shard(tmp_path, "there", "--executor", "ray") == made
        bad = [
            "shard",
            str(path),
            "--media",
            str(tmp_path / "media"),
            "--out",
            str(tmp_path / "x/toy"),
            "--strict",
        ]
        assert main([*bad, "--executor", "ray"]) == 1
    finally:
        ray.shutdown()


def test_without_ray_the_executor_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_world(tmp_path, count=2)
    assert (
        main(
            [
                "shard",
                str(path),
                "--media",
                str(tmp_path),
                "--out",
                str(tmp_path / "x"),
                "--executor",
                "ray",
            ]
        )
        == 1
    )
    assert "the package ray is not installed; pip install ray" in capsys.readouterr().err


def write_frames(folder: Path, count: int, *, rate: str = "") -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(folder / f"f{i}.png")
    if rate:
        (folder / "fps.txt").write_text(rate)


def test_a_folder_of_frames_is_one_video_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=1)
    write_frames(tmp_path / "media/clips/a", 12, rate="2\n")
    turns = sample(0)["messages"]
    add(
        path,
        images=[],
        videos=["clips/a"],
        messages=[turns[0] | {"content": "<video>\nHm?"}, turns[1]],
    )
    shard(tmp_path, "a", "--workers", "1")
    assert not rejected(tmp_path, "a")
    found = list(webdataset.WebDataset(str(tmp_path / "a/toy/toy-000000.tar"), shardshuffle=False))[
        1
    ]
    assert found["__key__"] == "toy-00000002"
    video = found["video0.frames.zip"]
    assert probe_video(video, "a") == VideoInfo(6.0, 2.0, 12)
    frames = decode_frames(video, "a", times=[0.0, 1.0, 5.9], tile_size=8)
    assert [int(frame[0].mean()) for frame in frames] == [0, 20, 110]
    assert main(["validate", str(tmp_path / "a/toy/toy-000000.tar"), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("rate", "count", "reason"),
    [("0", 2, "is not a frame rate"), ("x", 2, "is not a frame rate"), ("", 0, "no frame images")],
)
def test_folders_that_are_no_video_are_named(
    tmp_path: Path, rate: str, count: int, reason: str
) -> None:
    path = write_world(tmp_path, count=1)
    write_frames(tmp_path / "media/clips/a", count, rate=rate)
    turns = sample(0)["messages"]
    add(
        path,
        images=[],
        videos=["clips/a"],
        messages=[turns[0] | {"content": "<video>\nHm?"}, turns[1]],
    )
    shard(tmp_path, "a", "--workers", "1")
    assert [reason in found for found in rejected(tmp_path, "a")] == [True]


def test_a_frame_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=1)
    write_frames(tmp_path / "media/clips/a", 2)
    (tmp_path / "media/clips/a/f9.png").symlink_to(path)
    turns = sample(0)["messages"]
    add(
        path,
        images=[],
        videos=["clips/a"],
        messages=[turns[0] | {"content": "<video>\nHm?"}, turns[1]],
    )
    shard(tmp_path, "a", "--workers", "1")
    assert ["the frame f9.png is a link" in found for found in rejected(tmp_path, "a")] == [True]


def test_a_recipe_names_its_datasets_files_and_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path, count=4)
    recipe = (tmp_path / "recipe.yaml").read_text()
    named = recipe.replace("/toy/*.tar'", f"/toy/*.tar', jsonl: {path}, media: {tmp_path}/media")
    (tmp_path / "recipe.yaml").write_text(named)
    assert main(["shard", str(tmp_path / "recipe.yaml"), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/toy: 4 samples\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main(["shard", str(tmp_path / "recipe.yaml")]) == 1
    assert "none of its datasets has a jsonl" in capsys.readouterr().err


def test_a_shard_that_grows_too_long_goes_on_in_another_tar(tmp_path: Path) -> None:
    write_world(tmp_path, count=4)
    for i in range(4):
        Image.effect_noise((700, 700), 90).save(tmp_path / f"media/{i}.png")  # half a megabyte each
    made = shard(tmp_path, "a", "--workers", "2", "--max-shard-mb", "1")
    assert [name for name in sorted(made) if name.endswith("tar")] == [
        "toy-000000.tar",
        "toy-000000_1.tar",
        "toy-000001.tar",
    ]
    urls = [str(found) for found in sorted((tmp_path / "a/toy").glob("*.tar"))]
    assert [one["__key__"][-1] for one in webdataset.WebDataset(urls, shardshuffle=False)] == [
        "1",
        "2",
        "3",
        "4",
    ]
    (tmp_path / "a/toy/toy-000000_1.tar").unlink()
    assert shard(tmp_path, "a", "--workers", "2", "--max-shard-mb", "1") == made
