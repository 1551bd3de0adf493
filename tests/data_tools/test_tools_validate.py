"""`validate`: what cannot be decoded is listed and left out from then on; nothing is deleted."""

import io
import json
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_tools import validation
from data_tools.cli import main
from megatron_vita.config import MediaConfig
from megatron_vita.data.shards.index import read_index
from megatron_vita.data.shards.quarantine import (
    quarantine_path,
    read_quarantine,
    write_quarantine,
)
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.errors import DataError
from megatron_vita.media.images import open_image
from megatron_vita.media.video import frame_times
from tests.data_tools.toy_jsonl import train_tokenizer, write_shards, write_world
from tests.indexes import index_of
from tests.media.video_files import damage


def film(seconds: int = 3) -> bytes:
    """Noise at 10 frames a second."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for _ in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(
                noise.integers(0, 256, (48, 64, 3), np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def cut_jpeg() -> bytes:
    """A JPEG whose header is whole, so that the index takes it."""
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(buffer, "JPEG")
    return buffer.getvalue()[:8000]


def write(path: Path, media: dict[str, dict[str, list[ShardMedia]]]) -> None:
    with SampleWriter(path) as writer:
        for key, files in media.items():
            content = (
                "<image>" * len(files.get("image", []))
                + "<video>" * len(files.get("video", []))
                + "Hm?"
            )
            talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
            writer.write(key, record={"messages": talk}, media=files)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Shard of five samples, one with a truncated image, one with a video that cannot be decoded at
    all."""
    write_world(tmp_path)
    train_tokenizer(tmp_path)
    (tmp_path / "toy").mkdir()
    good = (tmp_path / "media/0.png").read_bytes()
    whole = film()
    start = whole.index(b"mdat") + 4
    end = whole.index(b"moov") - 4
    write(
        tmp_path / "toy/toy-000000.tar",
        {
            "a": {"image": [ShardMedia(".png", good)], "video": [ShardMedia(".mp4", whole)]},
            "b": {"image": [ShardMedia(".png", good), ShardMedia(".jpg", cut_jpeg())]},
            "c": {},
            "d": {
                "video": [ShardMedia(".mp4", whole[:start] + b"\xff" * (end - start) + whole[end:])]
            },
            "e": {"image": [ShardMedia(".png", good)]},
        },
    )
    return tmp_path / "toy/toy-000000.tar"


def test_what_cannot_be_decoded_is_listed_and_left_out(
    shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(shard.parents[1] / "recipe.yaml")
    before = shard.read_bytes()
    assert main(["index", recipe]) == 0
    assert len(read_index(index_of(shard))) == 5
    assert main(["validate", recipe, "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{shard} b.image1.jpg: cannot read this image" in out
    assert "5 samples in 1 shard; 2 bad" in out
    assert [(entry.by, entry.key) for entry in read_quarantine(shard).entries] == [
        ("validate", "b"),
        ("validate", "d"),
    ]
    assert shard.read_bytes() == before
    assert main(["index", recipe]) == 0
    assert "1 index written, 0 were current; 2 samples left out" in capsys.readouterr().out
    assert read_index(index_of(shard)).keys() == ["a", "c", "e"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_with_damaged_frames_is_named_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    path = tmp_path / "toy-000000.tar"
    write(path, {"a": {"video": [ShardMedia(".mp4", damage(film(), range(5, 16)))]}, "b": {}})
    for _ in range(2):  # the second time from the list
        assert main(["validate", str(path), "--workers", str(workers)]) == 0
        out = capsys.readouterr().out
        assert f"{path} a.video0.mp4: 11 packets cannot be decoded, 2 of 3 frames" in out
        assert "2 samples in 1 shard; 1 with frames in place of damaged ones, 0 bad" in out
    assert read_quarantine(path).entries == []


def test_shards_are_decoded_once_unless_they_or_the_sampling_change(
    shard: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(
        validation, "open_image", lambda data, name: decoded.append(name) or open_image(data, name)
    )
    path = shard.with_name("toy-000000.quarantine.json")

    def moment(target: str, *options: str) -> int:
        assert main(["validate", target, "--workers", "0", *options]) == 1
        return path.stat().st_mtime_ns

    first = moment(str(shard))
    assert len(decoded) == 4
    assert moment(str(shard)) == first
    assert len(decoded) == 4
    time.sleep(0.05)  # clocks of files tick slowly
    os.utime(shard)
    second = moment(str(shard))
    assert second > first
    recipe = shard.parents[1] / "recipe.yaml"
    assert moment(str(recipe), "media.max_fps=5.0") > second
    assert json.loads(path.read_text())["validated"] == {
        "samplings": [[1.0, 128], [5.0, 128]],
        "samples": 5,
    }


def test_each_dataset_is_sampled_as_itself(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int]] = []
    monkeypatch.setattr(
        validation,
        "frame_times",
        lambda info, **sampling: (
            asked.append(tuple(sampling.values())) or frame_times(info, **sampling)
        ),
    )
    recipe = shard.parents[1] / "recipe.yaml"
    sets = "{name: a, shards: SHARDS, max_frames: 7}, {name: b, shards: SHARDS, max_fps: 3.0}, {name: c, shards: SHARDS}"
    command = [
        "validate",
        str(recipe),
        f"data.train=[{sets}]".replace("SHARDS", str(shard)),
        "--workers",
        "0",
    ]
    assert main(command) == 1
    usual = MediaConfig()
    wanted = {(usual.max_fps, 7), (3.0, usual.max_frames), (usual.max_fps, usual.max_frames)}
    assert set(asked) == wanted
    validated = json.loads(shard.with_name("toy-000000.quarantine.json").read_text())["validated"]
    assert {tuple(sampling) for sampling in validated["samplings"]} == wanted
    asked.clear()
    assert main([*command[:2], "--workers", "0"]) == 1
    assert not asked


def write_texts(path: Path, texts: list[tuple[str, bytes]]) -> None:
    """A tar of raw texts, whose keys may come again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, text in texts:
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


@pytest.mark.parametrize("first", ["index", "validate"])
def test_of_samples_of_one_key_the_first_is_used_whichever_tool_comes_first(
    shard: Path, first: str
) -> None:
    recipe = str(shard.parents[1] / "recipe.yaml")
    write_texts(
        shard, [("a", b"One."), ("b", b"Two."), ("c", b"\xff"), ("a", b"Three."), ("c", b"Four.")]
    )
    for command in (first, "validate", "index"):
        main([command, recipe, "--workers", "0"])
    assert read_index(index_of(shard)).keys() == ["a", "b"]
    listed = [
        (entry.key, entry.reason.split(": ")[-1][:10]) for entry in read_quarantine(shard).entries
    ]
    assert sorted(listed) == [("a", "an earlier"), ("c", "an earlier"), ("c", "byte 0xff ")]


def test_an_index_is_made_again_where_the_list_or_the_rule_it_was_made_with_is_gone(
    shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(shard.parents[1] / "recipe.yaml")
    main(["validate", recipe, "--workers", "0"])

    def written() -> int:
        capsys.readouterr()
        assert main(["index", recipe, "--workers", "0"]) == 0
        return int(capsys.readouterr().out.split()[0])

    assert [written(), written()] == [1, 0]
    assert len(read_index(index_of(shard))) == 3
    quarantine_path(shard).unlink()
    assert [written(), written()] == [1, 0]
    assert len(read_index(index_of(shard))) == 5
    rule = shard.with_name("members.yaml")
    for change in (lambda: rule.write_text("caption: alt\n"), rule.unlink):
        change()
        assert [written(), written()] == [1, 0]


def test_an_index_takes_from_the_list_what_it_can_read_again(shard: Path) -> None:
    recipe = str(shard.parents[1] / "recipe.yaml")
    write_texts(shard, [("a", b"One."), ("b", b"Two.")])
    rule = shard.with_name("members.yaml")
    rule.write_text("text: alt\n")
    assert main(["index", recipe, "--workers", "0"]) == 0
    assert [entry.key for entry in read_quarantine(shard).entries] == ["a", "b"]
    rule.unlink()
    assert main(["index", recipe, "--workers", "0"]) == 0
    assert read_quarantine(shard).entries == []
    assert read_index(index_of(shard)).keys() == ["a", "b"]


def test_a_list_holds_for_its_shard_even_where_the_shard_s_time_lies_ahead(
    shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ahead = time.time() + 3600
    os.utime(shard, (ahead, ahead))
    assert main(["validate", str(shard), "--workers", "0"]) == 1
    assert "5 samples in 1 shard; 2 bad" in capsys.readouterr().out
    assert [entry.key for entry in read_quarantine(shard).entries] == ["b", "d"]


def test_a_shard_that_changes_while_it_is_decoded_is_named(
    shard: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*_: object) -> None:
        time.sleep(0.05)  # clocks of files tick slowly
        os.utime(shard)

    monkeypatch.setattr(
        validation, "write_quarantine", lambda *found: (write_quarantine(*found), changing())
    )
    assert main(["validate", str(shard), "--workers", "0"]) == 1
    assert (
        f"error: {shard}: it changed while it was decoded; run validate again"
        in capsys.readouterr().err
    )


def test_what_another_recipe_s_sampling_found_is_kept(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(shard.parents[1] / "recipe.yaml")

    def failing(data: bytes, name: str, *, times: Sequence[float], **_: object) -> None:
        if len(times) > 4:
            raise DataError(f"{name}: bad")

    monkeypatch.setattr(validation, "decode_frames", failing)
    assert (
        main(["validate", recipe, "media.max_frames=9", "media.max_fps=5.0", "--workers", "0"]) == 1
    )
    found = read_quarantine(shard)
    assert [entry.key for entry in found.entries] == ["a", "b", "d"]
    assert main(["validate", recipe, "media.max_frames=2", "--workers", "0"]) == 1
    both = read_quarantine(shard)
    assert both.entries == found.entries
    assert both.validated == {"samplings": [[1.0, 2], [5.0, 9]], "samples": 5}
    moment = quarantine_path(shard).stat().st_mtime_ns
    for options in (("media.max_frames=9", "media.max_fps=5.0"), ("media.max_frames=2",)):
        assert main(["validate", recipe, *options, "--workers", "0"]) == 1
    assert quarantine_path(shard).stat().st_mtime_ns == moment


def test_good_shards_give_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path)
    write_shards(tmp_path)
    assert main(["validate", str(tmp_path / "toy/toy-000000.tar")]) == 0
    assert "12 samples in 1 shard; 0 bad" in capsys.readouterr().out


def test_a_damaged_tar_is_bad_from_the_damage_on(
    shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(shard, shard.stat().st_size // 2)
    assert main(["validate", str(shard), "--workers", "1"]) == 1
    assert f"{shard}: not a readable .tar shard" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["toy.jsonl", "none.tar", "toy"])
def test_other_targets_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    write_world(tmp_path)
    (tmp_path / "toy").mkdir()
    assert main(["validate", str(tmp_path / target)]) == 1
    assert "one recipe (.yaml) or shards (.tar) are needed" in capsys.readouterr().err
