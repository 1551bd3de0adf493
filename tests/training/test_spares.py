"""Ranks of an elastic job that make no whole replica wait for the others, and end with them."""

from pathlib import Path

import pytest
import yaml

from tests.functional.launch import torchrun
from tests.functional.toy_run import make_toy_run


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
    assert "rank 2 waits: 2 ranks make whole replicas" in ended.stderr
    log = (Path(recipe["checkpoint"]["save"]) / "log.txt").read_text()
    assert "layout of 2 ranks" in log
    assert "step     2/2" in log or "step_00000002" in log
