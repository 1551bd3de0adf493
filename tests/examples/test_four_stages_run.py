"""A miniature of the four stages, from material to the report; kills and layouts do not change it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from examples.four_stages.run_folder import RunFolder
from megatron_vita.report.reading import read_run
from tests.environment import ROOT, environment_with
from tests.examples.four_stages_material import write_material

pytestmark = [
    pytest.mark.full("trains and asks four models, in about two minutes of CPU time"),
    pytest.mark.distributed,
]


def command(folder: Path, *words: str) -> list[str]:
    options = ["--miniature", "--folder", str(folder), "--material", str(folder / "material")]
    return [sys.executable, "-m", "examples.four_stages", *words, *options]


def run(folder: Path, *words: str) -> None:
    done = subprocess.run(
        command(folder, *words), cwd=ROOT, env=environment_with(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in read_run(folder).series("train/loss")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """All stages in one go."""
    folder = tmp_path_factory.mktemp("four_stages")
    write_material(folder / "material")
    run(folder)
    return RunFolder(folder=folder, miniature=True)


def test_every_stage_trains_and_is_scored_with_its_control(whole: RunFolder) -> None:
    results = json.loads((whole.folder / "results.json").read_text())
    rows = results["scores"]
    for stage in (1, 2, 3, 4):
        mine = {(row["test"], row["tokens"]): row for row in rows if row["stage"] == stage}
        assert {"short: all", "captions: all", "captions: category", "moments: all"} <= {
            test for test, _ in mine
        }
        assert {("needle", 200), ("needle", 400)} <= set(mine)
        assert all(row["control"] is not None for row in mine.values())
    trained = {row["stage"]: row["steps"] for row in results["training"]}
    assert trained == {1: 8, 2: 8, 3: 16, 4: 4}
    for stage in (1, 2, 3, 4):
        for test in ("short", "moments", "captions"):
            report = json.loads((whole.scores(stage) / test / "report.json").read_text())
            assert report["refused"] == 0
            assert report["rejected"] == []


def test_the_report_shows_all_of_it(whole: RunFolder) -> None:
    page = (whole.folder / "report.html").read_text()
    for said in ("after stage 4", "short: count", "Beside the paper", "data:image/png;base64"):
        assert said in page
    assert page.count("codes found after stage") == 4


def test_a_finished_run_is_not_done_again(whole: RunFolder) -> None:
    files = [whole.checkpoints(3) / "metrics.jsonl", whole.scores(3) / "short" / "answers.jsonl"]
    before = [file.stat().st_mtime_ns for file in files]
    run(whole.folder, "stage", "3")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_kill_in_stage_3_leaves_its_curve_as_it_is(whole: RunFolder, tmp_path: Path) -> None:
    """The same stage from the same weights, killed without warning in the middle."""
    copy = share(whole, tmp_path)
    kill_stage_3(copy, after=4)
    assert 0 < copy.steps_done(3) < 16
    run(copy.folder, "stage", "3")
    assert losses(copy.checkpoints(3)) == losses(whole.checkpoints(3))
    assert len(read_run(copy.checkpoints(3)).segments) == 2


def share(whole: RunFolder, folder: Path) -> RunFolder:
    """A folder with the data and the first two stages of another, by links."""
    (folder / "checkpoints").mkdir()
    for name in ("data", "material", "shards", "tests", "tokenizer.model"):
        (folder / name).symlink_to(whole.folder / name)
    for stage in (1, 2):
        (folder / "checkpoints" / f"stage{stage}").symlink_to(whole.checkpoints(stage))
    return RunFolder(folder=folder, miniature=True)


def kill_stage_3(copy: RunFolder, *, after: int) -> None:
    """Start stage 3 and kill all of its processes once it has a checkpoint of step `after`."""
    process = subprocess.Popen(
        command(copy.folder, "stage", "3"),
        cwd=ROOT,
        env=environment_with(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and copy.steps_done(3) < after:
        time.sleep(0.05)
    # Launchers put ranks into sessions of their own, so that killing a group would leave them.
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


LAYOUTS = {
    "tp2": "parallel.tensor_model_parallel_size=2",
    "cp2": "parallel.context_parallel_size=2",
}


@pytest.fixture(params=LAYOUTS)
def split(request: pytest.FixtureRequest, whole: RunFolder, tmp_path: Path) -> RunFolder:
    copy = share(whole, tmp_path)
    run(copy.folder, "stage", "3", LAYOUTS[request.param], "--processes", "2")
    return copy


def test_loss_curves_of_two_ranks_lie_on_that_of_one(split: RunFolder, whole: RunFolder) -> None:
    assert losses(split.checkpoints(3)) == pytest.approx(losses(whole.checkpoints(3)), rel=1e-4)
