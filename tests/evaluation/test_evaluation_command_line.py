"""python -m megatron_vita.evaluation: against a server on loopback, and against a checkpoint."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.commands import run_command
from megatron_vita.evaluation.__main__ import app
from tests.evaluation.chat_server import APIError, FakeChatServer, serving, texts_of


def evaluate(*arguments: object) -> int:
    return run_command(app, [str(argument) for argument in arguments], name="evaluation")


def reply(request: dict[str, Any]) -> str:
    pages = sum(part["type"] == "image_url" for part in request["messages"][0]["content"])
    if pages > 5:
        raise APIError(400, "the prompt is too long")
    return "00000"


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with serving(reply) as running:
        yield running


SMALL = ("--page-size", 160, "--font-size", 6, "--depths", 2, "--needles", 1)


def test_needles_through_a_server(
    server: FakeChatServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert (
        evaluate(
            "needle", "--server", server.url, "--pages", "2,8", *SMALL, "--at-once", 3, "--out", out
        )
        == 0
    )
    report = json.loads((out / "report.json").read_text())
    assert (report["right"], report["asked"], report["refused"]) == (0, 4, 2)
    assert report["lengths"] == [{"pages": 2, "tokens": 7}, {"pages": 8, "tokens": None}]
    assert report["settings"]["model"] == "tiny"
    assert "0 of 4 codes found" in capsys.readouterr().out
    assert {re.sub(r"the \w+ \w+\?", "it?", texts_of(r)[0].strip()) for r in server.requests} == {
        "What is the access code of it? Answer with its five digits alone."
    }


def test_questions_through_a_server(server: FakeChatServer, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "zeros?"}]},
        {"role": "assistant", "content": "00000"},
    ]
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    server.reply = lambda request: "00000."
    out = tmp_path / "out"
    options = ("--server", server.url, "--out", out)
    assert evaluate("questions", path, *options) == 0
    assert json.loads((out / "report.json").read_text())["all"]["right"] == 1
    path.write_text(json.dumps({"messages": turns}) + "\n\n")
    assert evaluate("questions", path, *options) == 1  # other samples, same folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pages", "1"], "either a checkpoint or a --server must answer"),
        (["--server", "URL"], "either --pages or --lengths"),
        (["--server", "URL", "--pages", "1", "--lengths", "1k"], "either --pages or --lengths"),
        (["--server", "URL", "--lengths", "1k"], "--lengths needs a checkpoint"),
        (["--server", "URL", "--pages", "1,x"], "--pages has 'x'"),
        (["--server", "URL", "--pages", "0"], "--pages has '0'"),
        (["--server", "URL", "--pages", "1", "--media", "pdf"], "media is 'pdf'"),
        (["--server", "URL", "--pages", "1", "--font", "none"], "font 'none'"),
        (["--server", "URL", "--pages", "1", "--text", "none.txt"], "none.txt"),
        (["--server", "ftp://x", "--pages", "1"], "must start with http"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    server: FakeChatServer,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    words = [server.url if word == "URL" else word for word in arguments]
    assert evaluate("needle", *words, "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not server.requests


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_vita import platform
    from megatron_vita.config import load_recipe
    from megatron_vita.training.loop import train
    from tests.functional.toy_run import make_toy_run

    folder = tmp_path_factory.mktemp("toy")
    path = make_toy_run(folder, samples=40)
    platform.initialize_process()
    train(
        load_recipe(
            path, ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=2"]
        )
    )
    return folder / "checkpoints"


@pytest.mark.parametrize("media", ["images", "video"])
def test_needles_in_an_engine_with_lengths_in_tokens(
    checkpoint: Path, tmp_path: Path, media: str
) -> None:
    options = (*SMALL, "--media", media, "--shared", "--at-once", 2, "--out", tmp_path)
    assert evaluate("needle", checkpoint, "--lengths", "160,200", *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["asked"] == 4
    assert report["refused"] == 0
    assert all(
        length["tokens"] <= limit
        for length, limit in zip(report["lengths"], (160, 200), strict=True)
    )


def test_questions_in_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    path = tmp_path / "held_out.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    assert (
        evaluate("questions", path, checkpoint, "--out", tmp_path / "out", "--max-new-tokens", 3)
        == 0
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["all"]["asked"] == 3
