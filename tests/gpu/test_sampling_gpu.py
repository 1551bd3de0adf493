"""A GPU draws what a CPU draws, and the host waits for it once."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_vita.inference.generation.beams import BeamSearch
from megatron_vita.inference.generation.sampling import Penalties, SamplingRow, sample_tokens
from megatron_vita.inference.requests.types import SamplingParams
from tests.gpu.fields import GPUS

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")

VOCAB = 151_680
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": 5},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 40, "logprobs": 0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.8},
    {"repetition_penalty": 1.3, "logprobs": 20},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
]


def draws(step: int, device: str) -> list[SamplingRow]:
    found = []
    for row, options in enumerate(OPTIONS):
        penalties = Penalties(torch.arange(row, 1000), vocab_size=VOCAB, device=device)
        for token in range(500, 600):
            penalties.add(token)
        sampling = SamplingParams(seed=row, **options)
        needed = {"repetition_penalty", "presence_penalty"} & options.keys()
        found.append(
            SamplingRow(sampling=sampling, step=step, penalties=penalties if needed else None)
        )
    return found


def logits(step: int) -> torch.Tensor:
    return (
        torch.randn(len(OPTIONS), VOCAB, generator=torch.Generator().manual_seed(step)) * 3
    ).bfloat16()


def test_a_gpu_draws_what_a_cpu_draws() -> None:
    for step in range(20):
        on_cpu = sample_tokens(logits(step), draws(step, "cpu"))
        on_gpu = sample_tokens(logits(step).cuda(), draws(step, "cuda"))
        assert [token.chosen.token_id for token in on_gpu] == [
            token.chosen.token_id for token in on_cpu
        ]
        for one, other in zip(on_gpu, on_cpu, strict=True):
            assert [score.token_id for score in one.likeliest] == [
                score.token_id for score in other.likeliest
            ]
            ours = one.chosen.logprob
            theirs = other.chosen.logprob
            assert ours == pytest.approx(theirs, abs=1e-4, nan_ok=True)


def waits(device_work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            device_work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def test_the_host_waits_once_a_step() -> None:
    batch = logits(0).cuda()
    rows = draws(0, "cuda")
    beams = BeamSearch(SamplingParams(num_beams=len(OPTIONS), logprobs=3), end_ids=frozenset([7]))
    sample_tokens(batch, rows)
    beams.advance(batch[:1])
    assert waits(lambda: sample_tokens(batch, rows)) == 1
    assert waits(lambda: beams.advance(batch)) == 1
