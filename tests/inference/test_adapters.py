"""Prompts of several adapters in one batch are answered as by each adapter's merged weights."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vita import platform
from megatron_vita.checkpoint import base as base_of
from megatron_vita.checkpoint import store
from megatron_vita.config import AdaptedMap, ParallelConfig
from megatron_vita.convert.adapters import AdapterCheckpoint, write_adapters
from megatron_vita.convert.families.adapters import update_of
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import CompletionOutput, SamplingParams
from megatron_vita.model.lora import named_linears, row_owners
from tests.functional.launch import run_ranks
from tests.inference.tiny import picture, prompts, tiny_engine, tiny_recipe

GREEDY = SamplingParams(max_new_tokens=8, logprobs=1, ignore_eos=True)
SMALL: dict[str, Any] = {
    "chunk_tokens": 24,
    "busy_chunk_tokens": 8,
    "page_tokens": 4,
    "cache_tokens": 2048,
}
FROZEN: dict[str, Any] = {
    f"training.freeze_{part}": True for part in ("vision_model", "projector", "language_model")
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "red": {"lora.rank": 3, "lora.alpha": 2.0},
    "green": {"lora.rank": 5, "lora.targets": ["q_proj", "v_proj", "down_proj"], "lora.rslora": True},
    "blue": {"lora.rank": 2, "lora.targets": ["layers.1.*_proj", "layers.1.*.o_proj"]},
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    """A checkpoint of random adapters."""
    recipe = tiny_recipe(folder).replaced(ADAPTERS[name] | FROZEN)
    generator = torch.Generator().manual_seed(len(name))

    def draw(adapted: AdaptedMap) -> tuple[torch.Tensor, torch.Tensor]:
        owners = row_owners(adapted.linear)
        rank = recipe.lora.rank
        a = torch.randn(len(adapted.chosen) * rank, adapted.linear.inputs, generator=generator)
        b = torch.randn(*owners.shape, rank, generator=generator)
        return a * 0.3, b * 0.1 * torch.isin(owners, torch.tensor(adapted.chosen))[..., None]

    base = {"path": "", "stamp": ""}
    write_adapters(folder / name, recipe, base=base, matrices=draw)
    return folder / name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    platform.initialize_process()
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write(folder, name) for name in ADAPTERS}


def open_engine(folders: dict[str, Path], parallel: ParallelConfig | None = None) -> Engine:
    recipe = tiny_recipe(next(iter(folders.values())).parent, parallel=parallel)
    return Engine(recipe, options=EngineOptions(**SMALL), adapters=folders)


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Engine:
    return open_engine(folders)


@torch.no_grad()
def merged_engine(folder: Path) -> Engine:
    """An engine without adapters, whose weights have those of a folder added."""
    engine = tiny_engine(folder.parent)
    opened = AdapterCheckpoint.open(folder)
    linears = dict(named_linears(engine.model))
    for adapted in opened.adapted:
        weight = linears[adapted.linear.name].get_parameter("weight")
        update = update_of(adapted, *opened.read(adapted))
        weight.add_(opened.recipe.lora.scale * update.view(weight.shape))
    return engine


def asked(name: str) -> list[Prompt]:
    return [dataclasses.replace(prompt, adapter=name) for prompt in prompts()[:3]]


def assert_same(actual: list[CompletionOutput], expected: list[CompletionOutput]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.token_ids == b.token_ids
        scores = [[score.chosen.logprob for score in each.scores] for each in (a, b)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_mixed_batch_is_answered_as_by_merged_weights(
    engine: Engine, folders: dict[str, Path]
) -> None:
    names = ["", *ADAPTERS]
    mixed = [prompt for each in zip(*map(asked, names), strict=True) for prompt in each]
    answers = engine.generate(mixed, sampling=GREEDY)
    said = set()
    for i, name in enumerate(names):
        alone = merged_engine(folders[name]) if name else tiny_engine(folders["red"].parent)
        expected = alone.generate(asked(""), sampling=GREEDY)
        assert_same(answers[i :: len(names)], expected)
        said.add(tuple(answers[i].token_ids))
    assert len(said) == len(names), "adapters that change nothing show nothing"


def test_answers_of_one_prompt_keep_its_adapter(engine: Engine, folders: dict[str, Path]) -> None:
    several = dataclasses.replace(GREEDY, n=3, temperature=1.0, seed=5)
    expected = merged_engine(folders["green"]).generate(asked("")[:1], sampling=several)
    assert_same(engine.generate(asked("green")[:1], sampling=several), expected)


def test_a_model_trained_in_pieces_is_served_in_whole_batches(
    engine: Engine, folders: dict[str, Path]
) -> None:
    pieces = {"training.recompute_granularity": "full", "training.mlp_chunk_tokens": 4}
    recipe = tiny_recipe(folders["red"].parent).replaced(pieces)
    other = Engine(recipe, options=EngineOptions(**SMALL), adapters=folders)
    mixed = [*asked("red")[:1], *asked("green")[:1]]
    assert_same(*(each.generate(mixed, sampling=GREEDY) for each in (other, engine)))


def test_the_prefix_cache_is_not_shared_between_adapters(folders: dict[str, Path]) -> None:
    engine = open_engine(folders)
    question = Prompt.ask("what color is the shape in this picture", images=[picture(3)])
    cached = []
    for name in ("", "red", "green", "", "red", "green"):
        number = engine.add(engine.prepare(dataclasses.replace(question, adapter=name)), GREEDY)
        while engine.has_work:
            engine.step()
        cached.append(engine.usage(number).cached_tokens)
        engine.forget(number)
    assert cached[:3] == [0, 0, 0]
    assert min(cached[3:]) > 0


def test_an_unknown_adapter_is_refused_by_name(engine: Engine) -> None:
    prompt = engine.prepare(asked("yellow")[0])
    with pytest.raises(ConfigError, match="adapter 'yellow' is not here; known: red, green, blue"):
        engine.add(prompt, GREEDY)


def answer_at_tp2(folders: dict[str, Path], expected: list[list[int]]) -> None:
    engine = open_engine(folders, ParallelConfig(tensor_model_parallel_size=2))
    if torch.distributed.get_rank() != 0:
        engine.serve_as_worker()
        return
    mixed = [prompt for name in ("red", "green") for prompt in asked(name)[:2]]
    answers = engine.generate(mixed, sampling=GREEDY)
    assert [answer.token_ids for answer in answers] == expected
    engine.close()


def test_two_ranks_answer_alike(engine: Engine, folders: dict[str, Path]) -> None:
    mixed = [prompt for name in ("red", "green") for prompt in asked(name)[:2]]
    expected = [answer.token_ids for answer in engine.generate(mixed, sampling=GREEDY)]
    run_ranks(answer_at_tp2, 2, folders, expected)


def test_adapters_of_another_base_or_part_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(folders["red"].parent).replaced(
        ADAPTERS["red"] | FROZEN | {"lora.targets": ["vision_model.*"]}
    )
    zeros = lambda adapted: (  # noqa: E731
        torch.zeros(len(adapted.chosen) * 3, adapted.linear.inputs),
        torch.zeros(*row_owners(adapted.linear).shape, 3),
    )
    write_adapters(tmp_path / "a", recipe, base={"path": "", "stamp": ""}, matrices=zeros)
    with pytest.raises(CheckpointError, match="trained the vision_model too"):
        open_engine({"red": folders["red"], "eye": tmp_path / "a"})
    scaled = recipe.replaced({"lora.targets": ["q_proj"], "lora.dora": True})
    write_adapters(tmp_path / "c", scaled, base={"path": "", "stamp": ""}, matrices=zeros)
    with pytest.raises(CheckpointError, match=r"DoRA's .*merge them \(vita convert merge-lora\)"):
        open_engine({"red": folders["red"], "scaled": tmp_path / "c"})
    recipe = recipe.replaced({"lora.targets": ["q_proj"]})
    write_adapters(tmp_path / "b", recipe, base={"path": "", "stamp": "0" * 16}, matrices=zeros)
    with pytest.raises(CheckpointError, match="belong to another base"):
        open_engine({"red": folders["red"], "far": tmp_path / "b"})


def test_the_right_base_is_accepted_and_stamped_once(
    engine: Engine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = base_of.base_state(store.model_state([engine.model]))
    recipe = tiny_recipe(folders["red"].parent).replaced(ADAPTERS["red"] | FROZEN)
    opened = AdapterCheckpoint.open(folders["red"])
    stamp = base_of.stamp_of(state)
    stamped = {name: folders["red"].parent / name for name in ("one", "two")}
    for place in stamped.values():
        known = {"path": "", "stamp": stamp}
        write_adapters(place, recipe, base=known, matrices=opened.read)
    counted = mock.Mock(return_value=stamp)
    monkeypatch.setattr(base_of, "stamp_of", counted)
    assert open_engine(stamped).adapters.names == ["one", "two"]
    assert counted.call_count == 1
