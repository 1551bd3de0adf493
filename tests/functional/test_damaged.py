"""A sample that one rank cannot decode is masked on all, noted, and masked again in a replay; too
many stop the run."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_vita.data.shards.index import read_index
from tests.functional.launch import torchrun
from tests.functional.recorded_run import run
from tests.functional.toy_run import make_toy_run
from tests.indexes import index_of
from tests.scale import scaled

ANY = "data.max_damaged=1"
LAYOUTS = {
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "cp2": ["parallel.context_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "dp2": [],
}


def spoil(shard: Path, *, every: int) -> list[str]:
    """Overwrites every so many images of a shard; gives the samples' keys."""
    index = read_index(index_of(shard))
    members = [
        m
        for i in range(len(index))
        for m in index.row(i).members.values()
        if m.name.endswith(".png")
    ][::every]
    with open(shard, "r+b") as file:
        for member in members:
            file.seek(member.offset + 40)
            file.write(b"\0" * (member.size - 40))
    return [member.name.split(".")[0] for member in members]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def spoilt_keys(whole: Path) -> list[str]:
    """Keys of the spoilt samples; the whole shards are kept aside."""
    shutil.copytree(whole.parent / "shards", whole.parent / "whole")
    return [
        key
        for shard in sorted((whole.parent / "shards").glob("*.tar"))
        for key in spoil(shard, every=7)
    ]


@pytest.fixture(scope="module")
def start(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override: the weights that runs of every layout start from."""
    folder = tmp_path_factory.mktemp("start")
    run(whole, folder, ANY, "training.train_iters=1", processes=1)
    return f"checkpoint.load={folder / 'checkpoints'}"


@pytest.fixture(scope="module")
def alone(
    whole: Path, spoilt_keys: list[str], start: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict]:
    return run(whole, tmp_path_factory.mktemp("alone"), ANY, start, processes=1)


def ledger(folder: Path) -> list[dict]:
    lines = [
        line
        for path in (folder / "checkpoints" / "damaged").glob("*.jsonl")
        for line in path.open()
    ]
    return sorted(
        (json.loads(line) for line in lines), key=lambda event: (event["pack"], event["document"])
    )


@pytest.mark.parametrize("layout", scaled(["pp2"], full=LAYOUTS))
def test_every_layout_masks_the_same_samples_and_has_the_same_losses(
    whole: Path,
    spoilt_keys: list[str],
    alone: dict[int, dict],
    start: str,
    tmp_path: Path,
    layout: str,
) -> None:
    found = run(whole, tmp_path, ANY, start, *LAYOUTS[layout])
    assert sum(row["damaged"] for row in found.values()) > len(spoilt_keys)
    for step, row in found.items():
        assert row["damaged"] == alone[step]["damaged"]
        assert row["loss"] == pytest.approx(alone[step]["loss"], rel=1e-4)
    events = ledger(tmp_path)
    assert {event["key"] for event in events} == set(spoilt_keys)
    assert len({(event["pack"], event["document"]) for event in events}) == len(events)
    manifest = json.loads(
        (tmp_path / "checkpoints" / "step_00000012" / "manifest.json").read_text()
    )
    assert manifest["damaged"] == events


@pytest.mark.full("takes a minute")
def test_a_replay_masks_what_was_masked_though_it_could_be_read_by_now(
    whole: Path, spoilt_keys: list[str], tmp_path: Path
) -> None:
    undisturbed = run(whole, tmp_path / "undisturbed", ANY)
    before = run(whole, tmp_path / "killed", ANY, death="step:7")
    assert sum(before[step]["damaged"] for step in (5, 6, 7)) > 0
    spoilt = whole.parent / "shards"
    spoilt.rename(whole.parent / "spoilt")
    (whole.parent / "whole").rename(spoilt)
    try:
        after = run(whole, tmp_path / "killed", ANY)
    finally:
        spoilt.rename(whole.parent / "whole")
        (whole.parent / "spoilt").rename(spoilt)
    for step in (5, 6, 7):
        for name in ("loss", "grad_norm", "damaged"):
            assert after[step][name] == undisturbed[step][name] == before[step][name]
    assert sum(row["damaged"] for row in after.values()) < sum(
        undisturbed[step]["damaged"] for step in after
    )


def test_too_many_damaged_samples_stop_all_ranks_with_a_list(
    whole: Path, spoilt_keys: list[str], tmp_path: Path
) -> None:
    overrides = [f"checkpoint.save={tmp_path}", "data.max_damaged=0.004", *LAYOUTS["tp2"]]
    ended = torchrun(
        "resume_worker.py",
        str(whole),
        str(tmp_path / "records"),
        "never",
        *overrides,
        processes=2,
        check=False,
    )
    assert ended.returncode
    assert "samples are damaged, more than data.max_damaged 0.004 allows" in ended.stderr
    assert any(f"shards-000000.tar {key} (" in ended.stderr for key in spoilt_keys)
