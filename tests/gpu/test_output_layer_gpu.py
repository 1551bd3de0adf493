"""On two GPUs: the output layer over vocabulary shards equals plain PyTorch."""

import json
from pathlib import Path

import pytest
import torch

from tests.functional.launch import torchrun


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_vocabulary_shards_equal_one_vocabulary(tmp_path: Path) -> None:
    torchrun("shard_checks.py", str(tmp_path / "found.json"), processes=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 72
    for case, error in found.items():
        assert error <= 1e-5, case
