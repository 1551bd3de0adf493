"""Any TP x CP of a checkpoint gives the answers of one process; a lost rank ends the service
instead of hanging it."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import ParallelConfig
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups
from tests.environment import environment_with
from tests.forked import start_program
from tests.functional.launch import HERE, run_ranks
from tests.inference.tiny import picture, prompts, tiny_engine, tiny_recipe
from tests.ports import free_port
from tests.scale import scaled

TP = "tensor_model_parallel_size"
CP = "context_parallel_size"
Layout = tuple[dict[str, Any], dict[str, Any]]
"""Fields of ParallelConfig and of EngineOptions."""
LAYOUTS: dict[int, list[Layout]] = {
    2: [
        ({TP: 2}, {}),
        ({CP: 2}, {}),
        ({CP: 2}, {"chunk_tokens": 1000, "page_tokens": 16}),
        ({TP: 2, "vision_tensor_parallel": True}, {}),
    ],
    3: [({CP: 3}, {}), ({CP: 3}, {"chunk_tokens": 7, "page_tokens": 2})],
    4: [({TP: 2, CP: 2}, {}), ({CP: 4}, {"chunk_tokens": 5, "page_tokens": 2})],
}


GREEDY = SamplingParams(max_new_tokens=8, logprobs=2, ignore_eos=True)
DRAWN = SamplingParams(
    max_new_tokens=8,
    temperature=1.0,
    top_k=40,
    top_p=0.95,
    n=2,
    seed=7,
    logprobs=0,
    ignore_eos=True,
)
BEAMS = SamplingParams(max_new_tokens=6, num_beams=3, n=2)
DAMAGED = MediaFile(name="cut.png", data=picture(1).data[:1200])


def answers(engine: Engine) -> list[dict]:
    """Greedy, sampled and beam search answers, the sampled ones with a cached prefix, and one that
    fails."""
    found = engine.generate(prompts(), sampling=GREEDY)
    found += engine.generate(prompts(), sampling=DRAWN)
    found += engine.generate(prompts()[:2], sampling=BEAMS)
    found += engine.generate(
        [Prompt.ask("what color", images=[picture(4), DAMAGED])], sampling=GREEDY
    )
    found += engine.generate(prompts()[:1], sampling=GREEDY)
    return [dataclasses.asdict(answer) for answer in found]


def write_answers(checkpoint: Path, layouts: dict[Path, Layout]) -> None:
    """Answer at one layout after another; rank 0 writes the answers to each layout's file."""
    for file, (parallel, options) in layouts.items():
        small: dict[str, Any] = {
            "chunk_tokens": 24,
            "busy_chunk_tokens": 8,
            "page_tokens": 4,
            "cache_tokens": 2048,
        }
        engine = Engine.from_checkpoint(
            checkpoint,
            parallel=ParallelConfig(**parallel),
            options=EngineOptions(**(small | options)),
        )
        if dist.get_rank() == 0:
            engine.idle()
            file.write_text(json.dumps(answers(engine)))
            engine.close()
        else:
            engine.serve_as_worker()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved by one process."""
    platform.initialize_process()
    folder = tmp_path_factory.mktemp("serving")
    model = tiny_engine(folder).model
    return store.save_checkpoint(
        folder / "checkpoint",
        step=1,
        state={"model": store.model_state([model])},
        manifest={"recipe": dataclasses.asdict(tiny_recipe(folder))},
        keep=1,
    )


@pytest.fixture(scope="module")
def one_group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a single key head, which TP ranks share."""
    platform.initialize_process()
    folder = tmp_path_factory.mktemp("one_group")
    recipe = tiny_recipe(folder).replaced({"model.language.num_query_groups": 1})
    groups.initialize_groups(recipe.parallel)
    state = {"model": store.model_state([build_model(recipe)])}
    manifest = {"recipe": dataclasses.asdict(recipe)}
    return store.save_checkpoint(folder / "ours", step=1, state=state, manifest=manifest, keep=1)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    file = tmp_path_factory.mktemp("one") / "answers.json"
    run_ranks(write_answers, 1, checkpoint, {file: ({}, {})})
    return json.loads(file.read_text())


@pytest.mark.parametrize("processes", scaled([2], full=list(LAYOUTS)))
def test_answers_are_those_of_one_process(
    processes: int, checkpoint: Path, expected: list[dict], tmp_path: Path
) -> None:
    files = {tmp_path / f"{i}.json": layout for i, layout in enumerate(LAYOUTS[processes])}
    run_ranks(write_answers, processes, checkpoint, files)
    for file, layout in files.items():
        found = json.loads(file.read_text())
        for answer, right in zip(found, expected, strict=True):
            assert {k: v for k, v in answer.items() if k != "scores"} == {
                k: v for k, v in right.items() if k != "scores"
            }, layout
            assert scores(answer) == pytest.approx(scores(right), abs=1e-5), layout
    assert [answer["finish"] for answer in expected].count("error") == 1


def test_ranks_that_share_a_key_head_answer_as_one_process(one_group: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        layout: dict[Path, Layout] = {tmp_path / f"{processes}.json": ({TP: processes}, {})}
        run_ranks(write_answers, processes, one_group, layout)
    alone, shared = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    for answer, right in zip(shared, alone, strict=True):
        assert answer["text"] == right["text"]
        assert scores(answer) == pytest.approx(scores(right), abs=1e-5)


@pytest.mark.full("20 seconds")
def test_a_cache_of_eight_bits_is_split_over_context_ranks_too(
    checkpoint: Path, expected: list[dict], tmp_path: Path
) -> None:
    file = tmp_path / "answers.json"
    run_ranks(write_answers, 2, checkpoint, {file: ({CP: 2}, {"cache_dtype": "fp8"})})
    rounded = likeliest_first_tokens(json.loads(file.read_text()))
    exact = likeliest_first_tokens(expected)
    assert rounded == pytest.approx(exact, abs=0.05)
    assert rounded != pytest.approx(exact, abs=1e-5)


def likeliest_first_tokens(answers: list[dict]) -> list[float]:
    """Log-probabilities of the first tokens, which do not depend on what is sampled."""
    firsts = [answer["scores"][0] for answer in answers if answer["scores"]]
    return [first["likeliest"][0]["logprob"] for first in firsts if first["likeliest"]]


def scores(answer: dict) -> list[float]:
    return [
        token["logprob"]
        for score in answer["scores"]
        for token in (score["chosen"], *score["likeliest"])
    ]


LOSSES = [({CP: 2}, 3, "busy"), ({TP: 2}, 2, "idle"), ({TP: 2}, 5, "busy")]


@pytest.mark.parametrize(("parallel", "steps", "doing"), scaled(LOSSES[:2], full=LOSSES))
def test_a_lost_rank_is_an_error_at_once(
    parallel: dict, steps: int, doing: str, tmp_path: Path
) -> None:
    tiny_recipe(tmp_path)  # makes the tokenizer
    port = free_port()
    ranks = []
    for rank in range(2):  # not by torchrun, which would end the others itself
        environment = environment_with(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        command = [
            str(HERE / "lost_rank_worker.py"),
            str(tmp_path),
            json.dumps(parallel),
            str(steps),
            doing,
        ]
        ranks.append(start_program(*command, env=environment, stderr=subprocess.DEVNULL))
    assert ranks[1].wait(timeout=120) == 3
    assert ranks[0].wait(timeout=60) == 0
    assert "a rank is gone" in (tmp_path / "error").read_text()
