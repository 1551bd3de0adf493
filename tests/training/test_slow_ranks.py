"""A rank that is slower than the others is named with what its time goes to."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from megatron_vita.config import load_recipe
from megatron_vita.training.callbacks.slow_ranks import RankTimes, find_slow_ranks
from megatron_vita.training.loop import train
from megatron_vita.training.step import step
from megatron_vita.training.step.batches import FinalBatches
from tests.functional.launch import run_ranks
from tests.functional.toy_run import make_toy_run

PAUSE = 0.5


def times(rank: int, **fields: Any) -> RankTimes:
    known: dict[str, Any] = {
        "host": "a",
        "stage": 0,
        "seconds": 10.0,
        "data": 0.0,
        "communication": 6.0,
    }
    return RankTimes(rank=rank, **(known | fields))


def test_the_rank_that_waits_least_is_the_slow_one() -> None:
    ranks = [times(0), times(1, communication=2.0), times(2)]
    (slow,) = find_slow_ranks(ranks, factor=1.5)
    assert (slow.times.rank, slow.factor) == (1, 2.0)
    assert slow.times.shares == pytest.approx({"data": 0, "compute": 0.8, "communication": 0.2})


def test_of_two_ranks_the_slower_one_is_named_by_what_the_other_takes() -> None:
    (slow,) = find_slow_ranks([times(0), times(1, communication=3.0)], factor=1.5)
    assert (slow.times.rank, slow.factor) == (1, 1.75)


def test_the_stages_of_a_pipeline_are_not_compared_with_each_other() -> None:
    ranks = [times(0), times(1), times(2, stage=1, communication=1.0)]
    assert find_slow_ranks([*ranks, times(3, stage=1, communication=1.0)], factor=1.5) == []


def test_ranks_that_differ_by_less_than_the_factor_are_not_named() -> None:
    assert find_slow_ranks([times(0), times(1, communication=5.0)], factor=1.5) == []


def _slow_down(recipe: str, part: str) -> None:
    """Train with a rank 1 that pauses while it waits for packs, or computes."""
    holder, name = {"data": (FinalBatches, "__next__"), "compute": (step, "prepare_tiles")}[part]
    original = getattr(holder, name)

    def paused(*arguments: Any, **keywords: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(PAUSE)
        return original(*arguments, **keywords)

    setattr(holder, name, paused)
    train(load_recipe(recipe, []))


@pytest.mark.parametrize("part", ["data", "compute"])
def test_a_rank_that_was_slowed_down_is_named_in_log_and_metrics(tmp_path: Path, part: str) -> None:
    path = make_toy_run(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["training"] |= {"train_iters": 3, "eval_interval": 0, "slow_rank_steps": 3}
    recipe["data"]["num_workers"] = 0
    path.write_text(yaml.safe_dump(recipe))
    run_ranks(_slow_down, 2, str(path), part)
    folder = Path(recipe["checkpoint"]["save"])
    (line,) = re.findall(
        "rank 1 on .* times as long as the median.*", (folder / "log.txt").read_text()
    )
    share = int(re.findall(rf"{part} (\d+)%", line)[0])
    assert share > 50, line
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    (named,) = [row for row in rows if "speed/slow_rank" in row]
    assert (named["step"], named["speed/slow_rank"]) == (3, 1)
    assert named[f"speed/slow_rank_{part}_share"] > 0.5
