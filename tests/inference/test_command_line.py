"""The command-line client: answers about images and videos, user errors as one line."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.commands import run_command
from megatron_vita.config import load_recipe
from megatron_vita.inference.__main__ import app
from megatron_vita.training.loop import train
from tests.evaluation.chat_server import APIError, FakeChatServer, serving, texts_of
from tests.forked import run_program
from tests.functional.toy_run import make_toy_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run that has learnt to answer with colours."""
    folder = tmp_path_factory.mktemp("toy")
    path = make_toy_run(folder, samples=60)
    platform.initialize_process()
    train(
        load_recipe(
            path, ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=10"]
        )
    )
    return folder


Client = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Client:
    """Run the client with arguments and input; return exit code, output and errors."""

    def ask(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return run_command(
            app, [str(word) for word in arguments], name="inference"
        ), *capsys.readouterr()

    return ask


SHORT = ("--max-new-tokens", 4)


def write_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 32, 3), 20 * i, dtype=np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_it_answers_about_an_image_a_video_and_nothing(
    ask: Client, toy: Path, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "clip.mp4")
    for media in (["--image", toy / "images" / "0.png"], ["--video", video], []):
        code, out, errors = ask(toy / "checkpoints", *media, "what color is it?", *SHORT)
        assert code == 0, errors
        assert len(out.splitlines()) >= 1


def test_without_a_question_it_converses_and_sampling_is_seeded(ask: Client, toy: Path) -> None:
    def draw(seed: int) -> str:
        options = ("--temperature", 1.5, "--seed", seed, *SHORT)
        code, out, errors = ask(toy / "checkpoints", *options, stdin="say red\nsay blue\n")
        assert code == 0, errors
        return out

    assert draw(3) == draw(3) != draw(4)


def test_what_is_not_said_is_as_the_recipe_advises(ask: Client, toy: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "advised"
    shutil.copytree(store.find_checkpoint(toy / "checkpoints"), checkpoint)
    manifest = store.read_manifest(checkpoint)  # without its checksum, as after an edit
    manifest["recipe"]["generation"]["temperature"] = 50.0
    (checkpoint / store.MANIFEST).write_text(json.dumps(manifest))

    def answers(*options: object) -> set[str]:
        asked = [ask(checkpoint, "say red", "--seed", seed, *options, *SHORT) for seed in (3, 4)]
        assert [code for code, _, _ in asked] == [0, 0]
        return {out for _, out, _ in asked}

    assert len(answers()) == 2
    assert len(answers("--temperature", 0)) == 1
    assert len(answers("--num-beams", 2)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png", "what?"], "none.png: cannot be read"),
        (["--image", ROOT / "LICENSE", "what?"], "LICENSE"),
        (["--temperature", "-1", "what?"], "temperature is -1.0: it must be from 0 to 100"),
        (["--tokenizer", "nowhere.model", "what?"], "nowhere.model"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_1(
    ask: Client, toy: Path, arguments: list[object], message: str
) -> None:
    code, out, errors = ask(toy / "checkpoints", *arguments)
    assert code == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not out


def test_a_process_of_its_own_ends_likewise(tmp_path: Path) -> None:
    result = run_program("-m", "megatron_vita.inference", str(tmp_path), "what?")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "neither a checkpoint" in result.stderr
    assert result.stderr.count("\n") == 1


def echo(request: dict[str, Any]) -> str:
    if texts_of(request)[-1].strip() == "bad":
        raise APIError(400, "bad is bad")
    return f"you said {texts_of(request)[-1].strip()}"


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with serving(echo) as running:
        yield running


@pytest.fixture
def client(ask: Client, server: FakeChatServer) -> Client:
    """The same client, connected to the server."""
    return partial(ask, "--server", server.url)


def test_a_server_answers_in_place_of_a_checkpoint(
    server: FakeChatServer, client: Client, toy: Path
) -> None:
    assert client("hello", "--image", toy / "images" / "0.png")[:2] == (0, "you said hello \n")
    (request,) = server.requests
    assert request["model"] == "tiny"
    assert request["stream"] is True
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]


def test_a_server_decides_what_is_not_said(server: FakeChatServer, client: Client) -> None:
    assert client("hello")[0] == 0
    drawn = {"temperature", "top_p", "top_k", "repetition_penalty"}
    assert not drawn & server.requests[-1].keys()
    assert client("hello", "--temperature", 0)[0] == 0
    assert server.requests[-1]["temperature"] == 0
    assert "top_p" not in server.requests[-1]


def test_every_sampling_option_reaches_the_server(server: FakeChatServer, client: Client) -> None:
    options = {
        "max-new-tokens": 7, "temperature": 0.5, "top-k": 3, "top-p": 0.9, "repetition-penalty": 1.5,
        "presence-penalty": 0.25, "frequency-penalty": 0.75, "seed": 9, "n": 2, "logprobs": 1, "length-penalty": 2.0,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    code, out, _ = client(
        "hello", *words, "--stop", "x", "--stop", "y", "--ignore-eos", "--model", "large"
    )
    assert code == 0
    request = server.requests[0]
    wanted: dict[str, Any] = {name.replace("-", "_"): value for name, value in options.items()}
    wanted |= {
        "max_tokens": wanted.pop("max_new_tokens"),
        "logprobs": True,
        "top_logprobs": wanted["logprobs"],
    }
    wanted |= {"stop": ["x", "y"], "ignore_eos": True, "model": "large"}
    assert {name: request[name] for name in wanted} == wanted
    assert out.splitlines()[:3] == [
        "you said hello ",
        "[2] you said hello ",
        "   -0.500 'you'  of  'you' -0.500",
    ]
    client("hello", "--num-beams", "4")
    assert server.requests[-1]["num_beams"] == 4


def test_a_conversation_keeps_its_turns_and_media_until_it_is_reset(
    server: FakeChatServer, client: Client, toy: Path
) -> None:
    image = toy / "images" / "0.png"
    lines = [f"/image {image}", "one", "two", "/reset", "three", "/exit", "four"]
    code, out, _ = client(stdin="\n".join(lines))
    assert code == 0
    assert out.splitlines() == ["you said one ", "you said two ", "you said three "]
    assert [texts_of(r) for r in server.requests] == [
        ["one"],
        ["one", "you said one ", "two"],
        ["three"],
    ]
    pictures = [
        sum("image_url" in str(message) for message in r["messages"]) for r in server.requests
    ]
    assert pictures == [1, 1, 0]


def test_a_wrong_line_costs_that_line_alone(server: FakeChatServer, client: Client) -> None:
    code, out, errors = client(stdin="one\n/image none.png\nbad\n\ntwo\n")
    assert code == 0
    assert out.splitlines()[-1] == "you said two "
    assert "none.png: cannot be read" in errors
    assert "400: bad is bad" in errors
    assert texts_of(server.requests[-1]) == ["one", "you said one ", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "nowhere", "what?"], "must start with http"),
        (["--server", "http://127.0.0.1:9", "--model", "m", "what?"], "127.0.0.1:9"),
        (["--server", "http://127.0.0.1:9", "checkpoint", "what?"], "give the question alone"),
        ([], "neither a checkpoint nor a --server"),
    ],
)
def test_who_is_to_answer_must_be_clear(ask: Client, arguments: list[str], message: str) -> None:
    code, _, errors = ask(*arguments)
    assert code == 1
    assert message in errors


def test_control_c_stops_the_answer_and_not_the_conversation() -> None:
    def answer(request: dict[str, Any]) -> str:
        if texts_of(request)[-1] == "short":
            return "quick"
        return "word " * 600

    # background jobs ignore it, as do their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with serving(answer, seconds_a_word=0.1) as server:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "megatron_vita.inference", "--server", server.url],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("long\n")
        process.stdin.flush()
        assert process.stdout.read(9) == "word word"  # it comes word by word
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate("short\n", timeout=30)
        assert out.splitlines()[-1] == "quick "
        assert process.returncode == 0
        assert server.left_early.wait(5)
        assert texts_of(server.requests[-1])[0] == "long"
        assert texts_of(server.requests[-1])[1].startswith("word word")
