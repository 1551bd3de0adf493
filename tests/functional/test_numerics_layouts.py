"""Ranks of every layout take the same decision on a step that one rank's gradient has spoilt."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vita.cli.replay import replay_run
from megatron_vita.config import load_recipe
from megatron_vita.errors import VitaError
from megatron_vita.training.callbacks.replicas import ReplicaCallback
from megatron_vita.training.step.step import train_step
from tests.functional.launch import run_ranks
from tests.functional.layout_worker import my_batches, open_layout
from tests.functional.poison import KINDS, Poison, check_skips
from tests.functional.rollback_runs import check_rollback
from tests.functional.toy_run import make_toy_run
from tests.scale import scaled

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"use_distributed_optimizer": False},
    "dp2overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
TRIED = scaled(["dp2", "pp2"], full=list(LAYOUTS))
TRAINED = scaled(["tp2"], full=list(LAYOUTS))


def check_layouts(fields_of: list[dict[str, Any]]) -> None:
    """Check on each rank that it skips or stops."""
    for fields in fields_of:
        check_skips(fields, KINDS)
        run = open_layout(dict(fields), None)
        Poison(run, rank=1).spoil(**KINDS[0])
        with pytest.raises(VitaError, match="gradient norm nan"):
            train_step(run, iter(my_batches(run, 0)))
        assert run.step == 0


def test_all_ranks_skip_or_stop_for_one_ranks_gradient() -> None:
    run_ranks(check_layouts, 2, [LAYOUTS[name] for name in TRIED])


def check_runs(recipe_path: str, folder: str, names: list[str]) -> None:
    """Check on each rank that rollbacks end as they must, and what they logged is replayed."""
    for name in names:
        fields = {f"parallel.{field}": value for field, value in LAYOUTS[name].items()}
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        check_rollback(load_recipe(recipe_path).replaced(fields), place)
        replay_run(place / "saved", 4)


def test_all_ranks_roll_back_for_one_ranks_gradient_and_replay_the_run(tmp_path: Path) -> None:
    run_ranks(check_runs, 2, str(make_toy_run(tmp_path)), str(tmp_path), TRAINED)


CASES: list[dict[str, Any]] = [
    {"use_distributed_optimizer": False},
    {"context_parallel_size": 3, "seq_length": 144, "document_alignment": 12},
]


def check_flipped_bits() -> None:
    """Check on each of three ranks that a flipped bit of one is found by all, and no other."""
    metrics: Any = None
    for fields in CASES:
        run = open_layout(fields | {"global_batch_size": 3}, None)
        callback = ReplicaCallback(steps=2)
        run.step = 2
        callback.after_step(run, metrics)
        name, parameter = list(run.unwrapped_model.named_parameters())[5]
        if dist.get_rank() == 1:
            parameter.data.view(-1).view(torch.int32)[3] ^= 1
        run.step = 3
        callback.after_step(run, metrics)  # not yet due
        run.step = 4
        message = f"step 4: .* after step 2: 1 parameter: {re.escape(name)} on rank 1, of 3 copies"
        with pytest.raises(VitaError, match=message):
            callback.after_step(run, metrics)


def test_a_flipped_bit_is_named_by_rank_and_parameter() -> None:
    run_ranks(check_flipped_bits, 3)
