"""Copies of weights that differ are found by hash, and named by rank and parameter."""

import struct
from pathlib import Path

import pytest
import torch

from megatron_vita.config import load_recipe
from megatron_vita.errors import VitaError
from megatron_vita.training.callbacks import replicas
from megatron_vita.training.callbacks.replicas import Divergence, _name, hash_bits
from megatron_vita.training.loop import train
from megatron_vita.training.run.run import Run

VALUES = [[0, 1, -2, 7, 7], [0.0, -1.5, 3e-39, float("inf"), float("nan")]]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


def hashed_by_hand(tensor: torch.Tensor) -> int:
    """The same sum with Python's integers."""
    words = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    total = sum(word * (2 * i + 1) for i, word in enumerate(words.tolist()))
    return struct.unpack("q", struct.pack("Q", total % 2**64))[0]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_hash_is_the_sum_of_words_times_odd_numbers(dtype: torch.dtype) -> None:
    for values in VALUES[: 1 if dtype == torch.int64 else 2]:
        tensor = torch.tensor(values).to(dtype)
        assert hash_bits(tensor).item() == hashed_by_hand(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_bit_and_each_place_changes_the_hash(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "PIECE", 4)
    tensor = torch.arange(11, dtype=torch.float32).to(dtype)
    words = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    known = {hash_bits(tensor).item()}
    count = 1
    for place in range(len(words)):
        for bit in range(8 * tensor.element_size()):
            mask = torch.tensor(1).bitwise_left_shift(torch.tensor(bit)).to(words.dtype)
            words[place] ^= mask
            known.add(hash_bits(tensor).item())
            count += 1
            words[place] ^= mask
    assert len(known) == count
    assert hash_bits(tensor.flip(0)).item() not in known


def test_the_ranks_that_differ_from_most_are_named() -> None:
    copies = [[5, 5, 5], [5, 6, 5], [1, 2, 3], [4, 4, 9]]
    found = _name(["same", "one", "none", "last"], copies, [0, 2, 4])
    assert [str(divergence) for divergence in found] == [
        "one on rank 2, of 3 copies",
        "none on ranks 0, 2, 4 (no value is held by a majority)",
        "last on rank 4, of 3 copies",
    ]


def test_a_run_compares_at_its_steps_and_before_each_save(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def find(run: Run) -> list[Divergence]:
        compared.append(run.step)
        found = [Divergence(parameter="weight", ranks=[1], copies=3)]
        return found if run.step == 3 else []

    monkeypatch.setattr(replicas, "find_divergences", find)
    fields = ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=4"]
    fields += [f"checkpoint.save={tmp_path}", "checkpoint.save_interval=3"]
    message = r"step 3: .* the same after step 2: 1 parameter: weight on rank 1, of 3 copies"
    with pytest.raises(VitaError, match=message):
        train(load_recipe(recipe_path, [*fields, "numerics.compare_weights_steps=2"]))
    assert compared == [2, 3]
    assert not list(tmp_path.glob("step_*"))
