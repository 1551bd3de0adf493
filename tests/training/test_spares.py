"""Ranks of an elastic job that make no whole replica wait for the others, and end with them."""

import os
from pathlib import Path

import pytest
import yaml

from megatron_vita.config import Recipe
from megatron_vita.training.spares import take_part
from tests.functional.launch import torchrun
from tests.functional.toy_run import make_toy_run


@pytest.mark.parametrize(
    ("rank", "local_rank", "local"),
    [(0, 0, 4), (3, 3, 4), (4, 0, 2), (5, 1, 2)],
    ids=["first host", "its last rank", "second host", "its last rank that trains"],
)
def test_ranks_that_train_count_only_those_of_their_host_that_do(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, local: int
) -> None:
    # Two hosts of 4 and 3 ranks; a global batch of 6 packs leaves one of them out.
    local_size = 4 if rank < 4 else 3
    names = {
        "RANK": rank,
        "WORLD_SIZE": 7,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    recipe = Recipe().replaced({"parallel.elastic": True, "training.global_batch_size": 6})
    assert take_part(recipe)
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("6", str(local))


@pytest.mark.full("starts three ranks")
def test_a_rank_that_makes_no_replica_waits_and_ends_with_the_others(tmp_path: Path) -> None:
    path = make_toy_run(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["training"] |= {"train_iters": 2, "eval_interval": 0}
    recipe["data"]["num_workers"] = 0
    recipe["parallel"] = {"elastic": True}
    path.write_text(yaml.safe_dump(recipe))
    root = Path(__file__).parents[2]
    ended = torchrun(root / "pretrain_vita.py", str(path), processes=3)
    assert "rank 2 is a spare: 2 of 3 ranks train" in ended.stderr
    log = (Path(recipe["checkpoint"]["save"]) / "log.txt").read_text()
    assert "layout of 2 ranks" in log
    assert "step     2/2" in log or "step_00000002" in log
