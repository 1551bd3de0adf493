"""Steps that are replayed as CUDA graphs follow the adapters of their rows."""

import dataclasses
from pathlib import Path

import pytest

from tests.gpu.fields import GPUS
from tests.inference.test_adapters import (
    ADAPTERS,
    GREEDY,
    asked,
    folders,
    merged_engine,
    open_engine,
)
from tests.inference.tiny import tiny_engine

__all__ = ["folders"]

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")

BATCHES = [
    [""] * 4,
    ["red"] * 4,
    [""] * 4,
    ["", *ADAPTERS],
    ["green", "", "green", "red"],
    [""] * 4,
]
"""Adapters of the requests of one batch after another, all of the same size."""


def test_batches_of_one_size_are_answered_as_by_merged_weights(folders: dict[str, Path]) -> None:
    (question, *_) = asked("")
    expected = {}
    for name in ("", *ADAPTERS):
        alone = merged_engine(folders[name]) if name else tiny_engine(folders["red"].parent)
        (answer,) = alone.generate([question], sampling=GREEDY)
        expected[name] = answer.token_ids
        alone.close()
    assert len(set(map(tuple, expected.values()))) == len(expected)
    engine = open_engine(folders)
    assert engine.worker.graphs is not None
    for names in BATCHES:
        prompts = [dataclasses.replace(question, adapter=name) for name in names]
        answers = engine.generate(prompts, sampling=GREEDY)
        assert [answer.token_ids for answer in answers] == [expected[name] for name in names]
    engine.close()
