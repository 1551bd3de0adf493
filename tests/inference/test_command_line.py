"""python -m megatron_vita.inference: answers about images and videos on the terminal, errors in one line."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))
from toy_run import make_toy_run

from megatron_vita import platform
from megatron_vita.config import load_recipe
from megatron_vita.training.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run that has learnt to answer with colours."""
    folder = tmp_path_factory.mktemp("toy")
    path = make_toy_run(folder, samples=60)
    platform.initialize_process()
    train(load_recipe(path, ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=10"]))
    return folder


def ask(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_vita.inference", *map(str, arguments), "--max-new-tokens", "4"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=stdin)


def write_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_it_answers_about_an_image_a_video_and_nothing(toy: Path, tmp_path: Path) -> None:
    checkpoint = toy / "checkpoints"
    video = write_video(tmp_path / "clip.mp4")
    for media in (["--image", toy / "images" / "0.png"], ["--video", video], []):
        result = ask(checkpoint, *media, "what color is it?")
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) >= 1


def test_without_a_question_it_reads_one_a_line_and_sampling_is_seeded(toy: Path) -> None:
    sampled = ["--temperature", "1.5", "--seed", "3"]
    one, two = (ask(toy / "checkpoints", *sampled, stdin="say red\nsay blue\n") for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert one.stdout != ask(toy / "checkpoints", *sampled[:-1], "4", stdin="say red\nsay blue\n").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png", "what?"], "none.png: cannot be read"),
        (["--image", "LICENSE", "what?"], "LICENSE"),
        (["--temperature", "-1", "what?"], "temperature is -1.0: it must be from 0 to 100"),
        (["--tokenizer", "nowhere.model", "what?"], "nowhere.model"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(toy: Path, arguments: list[str], message: str) -> None:
    result = ask(toy / "checkpoints", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    result = ask(tmp_path, "what?")
    assert result.returncode == 1
    assert "neither a checkpoint" in result.stderr
