"""Recipes that cannot work are refused by field, value, and what would work."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import (
    Recipe,
    load_recipe,
)
from megatron_vita.errors import ConfigError
from tests.config.recipes import AWARE, write

FULL = ["training.recompute_granularity=full"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {learning_rate: 1}", "unknown field optimizer.learning_rate"),
        ("optimiser: {lr: 1}", "unknown field optimiser; did you mean optimizer"),
        ("train_iters: 3", "unknown field train_iters; did you mean training.train_iters"),
        ("seed: 3", "unknown field seed; did you mean data.seed or training.seed"),
        (
            "parallel: {tensor_model_parallel: 2}",
            "did you mean parallel.tensor_model_parallel_size",
        ),
        ("training: {train_iters: many}", "training.train_iters is 'many': int is needed"),
        ("training: {bf16: 1}", "training.bf16 is 1: bool is needed"),
        ("data: {train: {name: x}}", "data.train is .*: a list is needed"),
        ("data: {train: [{name: x}]}", r"data.train\[0\].shards is missing"),
        ("model: 3", "model is 3: a group of fields is needed"),
        ("[1, 2]", "a recipe is a mapping"),
        ("a: [", "not YAML"),
        ("format_version: 99", "format_version is 99"),
    ],
)
def test_wrong_recipes_are_refused_by_field_and_value(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(write(tmp_path, text))
    assert "recipe.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.tensor_model_parallel_size=3",
            "num_attention_heads 40 is not a multiple of .* 3",
        ),
        (
            "parallel.pipeline_model_parallel_size=5",
            "48 layers do not divide over 5 pipeline stages",
        ),
        ("parallel.num_layers_in_first_pipeline_stage=2", "is set, but there is one stage"),
        ("parallel.virtual_pipeline_model_parallel_size=2", "2 needs several pipeline stages"),
        (
            "parallel.overlap_param_gather=true",
            "overlap_param_gather is True, which needs parallel.overlap_grad_reduce",
        ),
        (
            "training.recompute_granularity=all",
            "recompute_granularity is 'all'; known: none, full, selective",
        ),
        (
            "training.recompute_num_layers=2",
            "recompute_num_layers is 2, which needs training.recompute_granularity full",
        ),
        ("optimizer.vision_lr_mult=0", "vision_lr_mult is 0.0: it must be positive"),
        ("parallel.context_parallel_size=3", "document_alignment 16 is not a multiple of 6"),
        ("parallel.context_parallel_size=0", "context_parallel_size is 0: it must be at least 1"),
        (
            "parallel.sequence_parallel=true",
            "sequence_parallel is True, which needs parallel.tensor_model_parallel_size above 1; it is 1",
        ),
        (
            "parallel.attention_backend=flash",
            "attention_backend is 'flash'; known: auto, torch, te, fa4",
        ),
        (
            "data.seq_length=1000",
            "seq_length 1000 is not a multiple of .*16; the nearest that is: 992",
        ),
        ("model.vision.image_size=450", "image_size 450 is not a multiple of twice patch_size 14"),
        ("model.vision.num_attention_heads=15", "hidden_size 1024 is not a multiple of .* 15"),
        (
            "parallel.cp_comm_type=ring",
            r"cp_comm_type is 'ring'; known: p2p, all_gather, a2a, a2a\+p2p",
        ),
        (
            "parallel.hierarchical_context_parallel_sizes=[2, 2]",
            r"which needs parallel.cp_comm_type a2a\+p2p; it is p2p",
        ),
        (
            "parallel.vision_tensor_parallel=true",
            "vision_tensor_parallel is True, which needs parallel.tensor_model_parallel_size above 1",
        ),
        ("parallel.attention_backend=te", "attention_backend te needs training.bf16"),
        ("parallel.attention_backend=fa4", "attention_backend fa4 needs training.bf16"),
        ("training.recompute_method=all", "recompute_method is 'all'; known: block, uniform"),
        (
            "training.recompute_method=uniform",
            "recompute_method is uniform, which needs training.recompute_granularity full",
        ),
        (
            "training.recompute_modules=[mlp]",
            "which needs training.recompute_granularity selective; it is none",
        ),
        (
            "training.recompute_modules=[]",
            r"recompute_modules is \[\]: it must have at least 1 item",
        ),
        ("lora.targets=[]", r"lora.targets is \[\]: it must have at least 1 item"),
        ("training.recompute_modules=[moe]", "recompute_modules is .*; known: core_attn, mlp"),
        (
            "training.recompute_keep_attention_layers=-1",
            "recompute_keep_attention_layers is -1, which needs training.recompute_granularity full; "
            "it is none",
        ),
        (
            "training.recompute_keep_attention_layers=-2",
            "recompute_keep_attention_layers is -2: it must be at least -1",
        ),
        ("training.mlp_chunk_tokens=-1", "mlp_chunk_tokens is -1: it must be at least 0"),
        (
            "training.mlp_chunk_tokens=8192",
            "mlp_chunk_tokens is 8192, which needs the MLP recomputed",
        ),
        (
            "training.recompute_vision_method=tiles",
            "recompute_vision_method is tiles, which needs training.recompute_vision",
        ),
        (
            "training.recompute_vision_method=pixels",
            "recompute_vision_method is 'pixels'; known: layers, tiles",
        ),
        ("training.vision_tiles_at_once=0", "vision_tiles_at_once is 0: it must be at least 1"),
        (
            "model.vision.normalization=GroupNorm",
            "normalization is 'GroupNorm'; known: LayerNorm, RMSNorm",
        ),
        (
            "data.train=[{name: a, shards: b, ratio: 0}]",
            "dataset a: ratio is 0.0: it must be positive",
        ),
        (
            "model.language.num_query_groups=7",
            "num_attention_heads 40 is not a multiple of num_query_groups 7",
        ),
        ("model.language.kv_channels=127", "kv_channels is 127"),
        ("model.projector.kind=linear", "kind is 'linear'; known: long_vita, internvl"),
        ("media.max_tiles=0", "min_tiles <= max_tiles is needed"),
        ("media.tiling=any", "tiling is 'any'; known: dynamic, anyres"),
        ("media.grids=[2x1, 2by2]", "grids holds '2by2': COLSxROWS is needed"),
        ("media.max_fps=0", "max_fps is 0.0: it must be positive"),
        ("media.normalization=zeros", "normalization is 'zeros'; known: imagenet, clip, siglip"),
        ("media.video_fit=crop", "video_fit is 'crop'; known: letterbox, squash"),
        ("text.template=alpaca", "template is 'alpaca'; known: chatml, plain, jinja"),
        ("optimizer.min_lr=1", "0 <= min_lr <= lr is needed"),
        ("optimizer.exp_avg_dtype=int8", "exp_avg_dtype is 'int8'; known: fp32, bf16, fp16, fp8"),
        (
            "optimizer.exp_avg_dtype=bf16",
            "bf16, which needs optimizer.use_precision_aware_optimizer",
        ),
        ("optimizer.store_param_remainders=true", "needs optimizer.use_precision_aware_optimizer"),
        ("optimizer.optimizer_cpu_offload=true", "needs optimizer.use_precision_aware_optimizer"),
        (
            "optimizer.use_precision_aware_optimizer=true",
            r"use_precision_aware_optimizer needs training\.bf16",
        ),
        (
            "optimizer.reduce_scatter_with_fp32_accumulation=true",
            "reduce_scatter_with_fp32_accumulation is True, which needs optimizer.main_grads_dtype "
            "bf16; it is fp32",
        ),
        (
            "optimizer.optimizer_offload_fraction=0.5",
            "optimizer_offload_fraction is 0.5, which needs optimizer.optimizer_cpu_offload",
        ),
        ("optimizer.optimizer_offload_fraction=1.5", "fraction is 1.5: it must be above 0"),
        ("optimizer.lr=0", "optimizer.lr is 0.0: it must be positive"),
        ("optimizer.lr_warmup_fraction=1.0", "lr_warmup_fraction is 1.0"),
        ("training.global_batch_size=0", "global_batch_size is 0: it must be at least 1"),
        ("checkpoint.keep=0", "checkpoint.keep is 0"),
        ("nothing", "override 'nothing' is not of the form"),
        ("format_version.x=1", "format_version is not a group"),
    ],
)
def test_values_that_cannot_work_are_refused_with_what_would(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, "format_version: 1"), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.context_parallel_size=4", "parallel.cp_comm_type=a2a+p2p"], r"\[heads, ring\], .* 4; it is \[\]"),
        (
            ["parallel.context_parallel_size=4", "parallel.cp_comm_type=a2a", "parallel.tensor_model_parallel_size=4"],
            "a2a splits model.language.num_attention_heads over 4 ranks, but a TP rank has 10; use p2p or all_gather",
        ),
        (
            ["parallel.tensor_model_parallel_size=8", "parallel.vision_tensor_parallel=true",
             "model.vision.ffn_hidden_size=4100"],
            "ffn_hidden_size 4100 is not a multiple of .* 8, which parallel.vision_tensor_parallel needs",
        ),
        (["parallel.attention_backend=te", "training.bf16=true", "model.language.kv_channels=256"], "of 8 up to 128"),
        (["parallel.attention_backend=fa4", "training.bf16=true", "model.language.kv_channels=80"], "right for 64 and 128"),
        (
            ["parallel.attention_backend=fa4", "training.bf16=true", "parallel.context_parallel_size=2",
             "parallel.cp_comm_type=a2a"],
            "attention_backend is fa4, but parallel.cp_comm_type is a2a: fa4 gathers keys",
        ),
        (["training.fp8_recipe=delayed"], "fp8_recipe is 'delayed'; known: none, tensorwise, blockwise"),
        (["training.fp8_recipe=tensorwise"], "fp8_recipe is tensorwise, which needs training.bf16"),
        (
            ["training.fp8_recipe=tensorwise", "training.bf16=true", "parallel.attention_backend=torch"],
            "fp8_recipe is tensorwise, but parallel.attention_backend is torch",
        ),
        (
            ["training.fp8_recipe=blockwise", "training.bf16=true", "data.seq_length=4160"],
            "data.seq_length over CP and SP ranks is 4160: training.fp8_recipe blockwise needs a multiple of 128",
        ),
        (
            ["training.fp8_recipe=tensorwise", "training.bf16=true", "data.seq_length=4096",
             "training.mlp_chunk_tokens=1536", "training.recompute_granularity=full"],
            "training.mlp_chunk_tokens is 1536: training.fp8_recipe tensorwise needs pieces of equal length",
        ),
        ([*AWARE, "parallel.use_distributed_optimizer=false"], "needs parallel.use_distributed_optimizer"),
        (
            [*AWARE, "optimizer.store_param_remainders=true", "optimizer.main_params_dtype=fp16"],
            "store_param_remainders is True, which needs optimizer.main_params_dtype fp32; it is fp16",
        ),
        (
            [*AWARE, "optimizer.optimizer_cpu_offload=true", "optimizer.exp_avg_dtype=bf16"],
            "exp_avg_dtype is bf16, but optimizer_cpu_offload keeps weights and moments whole",
        ),
        (
            [*AWARE, "optimizer.optimizer_cpu_offload=true", "optimizer.store_param_remainders=true"],
            "store_param_remainders is True, but optimizer_cpu_offload keeps weights and moments whole",
        ),
        (
            ["data.isolate_documents=false", "parallel.context_parallel_size=3", "data.seq_length=4000"],
            "data.seq_length 4000 is not a multiple of 6, .* each pack is split into that many chunks",
        ),
        (
            ["training.recompute_granularity=full", "training.recompute_num_layers=49"],
            "recompute_num_layers is 49, but no rank has more than 48 layers at once",
        ),
        (
            [*FULL, "training.recompute_keep_attention_layers=-2"],
            "recompute_keep_attention_layers is -2: it must be at least -1",
        ),
        (
            [*FULL, "training.recompute_num_layers=4", "training.recompute_keep_attention_layers=5"],
            "recompute_keep_attention_layers is 5, but no rank recomputes more than 4 layers at once",
        ),
        (
            [*FULL, "training.recompute_method=uniform", "training.recompute_keep_attention_layers=-1"],
            "recompute_keep_attention_layers is -1, which needs training.recompute_method block; it is uniform",
        ),
        (["training.activation_offload_fraction=0.5"], "fraction is 0.5, which needs training.recompute_granularity full"),
        (
            [*FULL, "training.recompute_method=uniform", "training.activation_offload_fraction=0.5"],
            "fraction is 0.5, which needs training.recompute_method block",
        ),
        (["training.recompute_granularity=selective", "training.mlp_chunk_tokens=8"], "mlp among recompute_modules"),
        (["model.text_only=true", "training.freeze_language_model=true"], "nothing is left to train"),
    ],
)  # fmt: skip
def test_fields_that_cannot_work_together_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, "format_version: 1"), overrides)


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    parts = [
        f"training.freeze_{part}=true" for part in ("vision_model", "projector", "language_model")
    ]
    with pytest.raises(ConfigError, match="nothing is left to train"):
        load_recipe(write(tmp_path, "format_version: 1"), parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.train_iter": 3}, "unknown field training.train_iter; did you mean training.train_iters"),
        ({"train_iters": 3}, "unknown field train_iters; did you mean training.train_iters"),
        ({"trainin.seed": 3}, "unknown field trainin; did you mean training"),
        ({"format_version.major": 3}, "format_version is not a group of fields"),
        ({"training.train_iters": "3.5"}, "training.train_iters is '3.5': int is needed"),
        ({"training.train_iters": 0}, "training.train_iters is 0: it must be at least 1"),
        ({"parallel.attention_backend": "te"}, r"attention_backend te needs training\.bf16"),
        ({"data.train": [{"name": "a"}]}, r"data\.train\[0\]\.shards is missing"),
    ],
)  # fmt: skip
def test_replaced_refuses_what_a_recipe_file_would_be_refused_for(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe().replaced(changes)
