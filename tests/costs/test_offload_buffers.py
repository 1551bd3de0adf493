"""Buffers for activations that wait on the host, counted by hand."""

from pathlib import Path

import pytest

from megatron_vita.config import load_recipe
from megatron_vita.costs.memory.offload import offload_buffers

FULL = ["training.recompute_granularity=full", "training.recompute_keep_attention_layers=-1"]
SHAPE = [
    "model.language.num_layers=8", "model.language.hidden_size=64", "model.language.num_attention_heads=8",
    "model.language.num_query_groups=4", "model.language.kv_channels=16", "model.language.ffn_hidden_size=64",
    "data.seq_length=256", "training.global_batch_size=8", "training.activation_offload_fraction=1",
]  # fmt: skip
TP2 = ["parallel.tensor_model_parallel_size=2"]
SP = [*TP2, "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
BF16 = ["training.bf16=true"]
INPUT = 256 * 64 * 4
OUTPUT = 256 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("overrides", "stage", "expected"),
    [
        (["training.activation_offload_fraction=0"], 0, {}),
        ([], 0, {INPUT: 8, OUTPUT: 8}),
        (BF16, 0, {INPUT // 2: 8, OUTPUT // 2: 8}),
        (["training.recompute_keep_attention_layers=0"], 0, {INPUT: 8}),
        (["training.recompute_keep_attention_layers=3"], 0, {INPUT: 8, OUTPUT: 3}),
        (["training.activation_offload_fraction=0.3"], 0, {INPUT: 3, OUTPUT: 3}),
        (
            [
                "training.activation_offload_fraction=0.7",
                "training.recompute_keep_attention_layers=3",
            ],
            0,
            {INPUT: 6, OUTPUT: 1},
        ),
        (
            ["training.activation_offload_fraction=0.5", "training.recompute_num_layers=4"],
            0,
            {INPUT: 2, OUTPUT: 2},
        ),
        (TP2, 0, {INPUT: 8 + 8}),  # an output of half the heads is as large as an input
        (SP, 0, {INPUT // 2: 8, OUTPUT // 2: 8}),
        (["parallel.context_parallel_size=2"], 0, {INPUT // 2: 8, OUTPUT // 2: 8}),
        (PP2, 0, {INPUT: 2 * 4, OUTPUT: 2 * 4}),  # two packs in flight
        (PP2, 1, {INPUT: 4, OUTPUT: 4}),
        # Chunks of two layers. Of the first stage, 2 x 1 + 2 forwards before the first backward.
        (VPP2, 0, {INPUT: 5 * 2, OUTPUT: 5 * 2}),
        (VPP2, 1, {INPUT: 3 * 2, OUTPUT: 3 * 2}),
    ],
)
def test_a_step_fills_so_many_buffers_at_once(
    tmp_path: Path, overrides: list[str], stage: int, expected: dict[int, int]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{}")
    recipe = load_recipe(path, [*SHAPE, *FULL, *overrides])
    assert dict(offload_buffers(recipe, stage, data_parallel=1)) == expected
