"""Adapters are models of their own to clients, chosen by the request's `model`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vita.errors import ConfigError
from megatron_vita.inference.server.__main__ import named_adapters, parse_arguments
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import MODEL, RunningServer, running


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(FakeEngine(), adapters=["red", "team/green"]) as server:
        yield server


@pytest.mark.parametrize(("model", "adapter"), [(MODEL, ""), ("red", "red"), ("team/green",) * 2])
def test_the_models_name_chooses_the_adapter(
    server: RunningServer, model: str, adapter: str
) -> None:
    answer = server.chat("hello", model=model)
    assert answer.status_code == 200
    assert answer.json()["model"] == model
    assert server.engine.prompts[-1].adapter == adapter


def test_all_models_are_listed_and_shown(server: RunningServer) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [MODEL, "red", "team/green"]
    for model in listed:
        assert server.client.get(f"/v1/models/{model['id']}").json() == model


def test_another_name_is_refused_with_those_that_are_here(server: RunningServer) -> None:
    error = server.error("hello", status=404, model="blue")
    assert error["message"] == (
        "the model 'blue' is not here: this server has 'toy', 'red', 'team/green'"
    )
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert server.client.get("/v1/models/blue").status_code == 404


def test_options_name_a_folder_for_each_adapter() -> None:
    arguments = parse_arguments(["model", "--lora", "a=x/y", "--lora", "b=z=1"])
    found = named_adapters(arguments.lora, model="model")
    assert found == {"a": Path("x/y"), "b": Path("z=1")}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["a"], "--lora is 'a': NAME=FOLDER is needed"),
        (["=x"], "--lora is '=x': NAME=FOLDER is needed"),
        (["a="], "--lora is 'a=': NAME=FOLDER is needed"),
        (["a=x", "a=y"], "--lora is 'a=y': another model is named 'a'"),
        (["model=x"], "--lora is 'model=x': another model is named 'model'"),
    ],
)
def test_other_forms_and_names_given_twice_are_refused(given: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        named_adapters(given, model="model")
    assert str(raised.value) == reason
