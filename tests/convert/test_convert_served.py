"""An exported folder is served by `transformers serve`, and its answer is that of our engine."""

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import SamplingParams
from tests.convert.asked_of_both import engine_of
from tests.convert.published_models import internvl_hf
from tests.media.picture_files import file_of, photograph
from tests.ports import free_port

TOKENS = 8
START_SECONDS = 120


@pytest.fixture
def port() -> Iterator[int]:
    """Port of a server of transformers."""
    number = free_port()
    program = (sys.executable, "-m", "transformers.cli.transformers", "serve")
    options = ("--device", "cpu", "--dtype", "float32", "--port", str(number))
    with subprocess.Popen([*program, *options]) as server:
        yield number
        server.terminate()


def ask(port: int, model: Path, question: str, image: bytes) -> str:
    """Ask once the server answers at all; returns the answer's text."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"model": str(model), "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    address = f"http://localhost:{port}/v1/chat/completions"
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            response = httpx.post(address, json=body, timeout=START_SECONDS, trust_env=False)
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.2)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.full("starts a server of another program")
def test_an_export_in_the_form_of_internvl_is_served_by_transformers(
    tmp_path: Path, port: int
) -> None:
    (tmp_path / "theirs").mkdir()
    internvl_hf(tmp_path / "theirs")
    engine = engine_of(tmp_path / "theirs", to=tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "served")
    image = file_of(photograph((90, 60)), "PNG")
    prompt = Prompt(
        messages=[{"role": "user", "content": "<image>\nWhat is this?"}],
        images=[MediaFile(name="a.png", data=image)],
    )
    sampling = SamplingParams(max_new_tokens=TOKENS)
    (expected,) = engine.generate([prompt], sampling=sampling)
    assert ask(port, tmp_path / "served", "What is this?", image) == expected.text
