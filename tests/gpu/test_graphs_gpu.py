"""CUDA graphs of one engine after another in one process."""

from functools import partial

import pytest
import torch

from megatron_vita.inference.runner.cuda_graphs import GraphPool
from tests.gpu.fields import GPUS

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")


def test_graphs_can_be_recorded_after_all_earlier_ones_were_given_back() -> None:
    number = torch.ones(1 << 20, device="cuda")
    for factor in (2.0, 3.0):
        pool = GraphPool()
        times = pool.record(partial(torch.mul, number, factor))
        plus = pool.record(partial(torch.add, number, factor))
        for value in (1.0, 5.0):
            number.fill_(value)
            assert times.launch().unique().tolist() == [value * factor]
            assert plus.launch().unique().tolist() == [value + factor]
        pool.close()
