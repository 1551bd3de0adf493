"""Recipes are read strictly: unknown names, wrong types and sizes that do not divide are refused by
name."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.config import (
    CallbackConfig,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TextConfig,
    describe_fields,
    load_recipe,
    recipe_from_dict,
)
from megatron_vita.config.miniature import shrink
from megatron_vita.errors import ConfigError

ROOT = Path(__file__).parents[2]

FULL = ["training.recompute_granularity=full"]
AWARE = ["training.bf16=true", "optimizer.use_precision_aware_optimizer=true"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("field", ["training.tensorboard_dir", "checkpoint.load", "data.plan"])
def test_an_empty_override_empties_a_field_of_text(tmp_path: Path, field: str) -> None:
    group, name = field.split(".")
    path = write(tmp_path, f"format_version: 1\n{group}: {{{name}: somewhere}}")
    for text in (f"{field}=", f"{field}=''"):
        assert getattr(getattr(load_recipe(path, [text]), group), name) == ""


def test_values_of_the_file_and_then_of_overrides_replace_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr: 3e-4}\nparallel: {tensor_model_parallel_size: 4}\n")
    recipe = load_recipe(
        path, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.parallel.tensor_model_parallel_size == 2
    assert recipe.parallel.sequence_parallel is True
    assert recipe.optimizer.clip_grad == 1.0


def test_a_recipe_builds_on_others_in_order_and_its_own_fields_win(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(
        tmp_path / "parts", "optimizer: {lr: 1e-3, clip_grad: 2.0}\ntraining: {seed: 1}\n"
    ).rename(tmp_path / "a.yaml")
    write(tmp_path / "parts", "base: [../a.yaml]\noptimizer: {lr: 2e-3}\n")
    recipe = load_recipe(
        write(tmp_path, "base: [a.yaml, parts/recipe.yaml]\noptimizer: {min_lr: 1e-4}\n")
    )
    assert (recipe.optimizer.lr, recipe.optimizer.clip_grad, recipe.optimizer.min_lr) == (
        2e-3,
        2.0,
        1e-4,
    )
    assert recipe.training.seed == 1


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("3.5", "3.5: cannot read the recipe"),
        ("{a: b.yaml}", "base is {'a': 'b.yaml'}: a list of recipe files is needed"),
        ("[[a.yaml]]", r"base is \[\['a.yaml'\]\]: a list of recipe files is needed"),
        ("none.yaml", "none.yaml: cannot read the recipe"),
        ("recipe.yaml", "base recipe.yaml includes this file again"),
        ("[none.yaml]", "none.yaml: cannot read the recipe"),
        ("[recipe.yaml]", "base recipe.yaml includes this file again"),
    ],
)
def test_wrong_bases_are_refused(tmp_path: Path, base: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, f"base: {base}"))


def test_a_recipe_survives_the_way_through_plain_values() -> None:
    recipe = Recipe()
    assert recipe_from_dict(dataclasses.asdict(recipe)) == recipe


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
            "sequence_parallel needs tensor_model_parallel_size of at least 2",
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
            "vision_tensor_parallel needs tensor_model_parallel_size of at least 2",
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
        (["training.fp8_recipe=tensorwise"], "fp8_recipe tensorwise needs training.bf16"),
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


def test_uneven_first_and_last_stages_share_the_layers_that_are_left(tmp_path: Path) -> None:
    first = "parallel.num_layers_in_first_pipeline_stage=10"
    last = "parallel.num_layers_in_last_pipeline_stage=14"
    path = write(tmp_path, "parallel: {pipeline_model_parallel_size: 4}")
    assert load_recipe(path, [first, last]).parallel.layers_of_stages(48) == [10, 12, 12, 14]
    assert load_recipe(path).parallel.layers_of_stages(48) == [12, 12, 12, 12]
    with pytest.raises(
        ConfigError, match=r"48 layers do not divide over 4 pipeline stages of which \{0: 10\}"
    ):
        load_recipe(path, [first])


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    parts = [
        f"training.freeze_{part}=true" for part in ("vision_model", "projector", "language_model")
    ]
    with pytest.raises(ConfigError, match="nothing is left to train"):
        load_recipe(write(tmp_path, "format_version: 1"), parts)


def test_a_world_that_does_not_divide_is_refused() -> None:
    recipe = Recipe().replaced({"parallel.tensor_model_parallel_size": 4})
    with pytest.raises(ConfigError, match="6 ranks are not a multiple of 4"):
        recipe.data_parallel_size(6)
    with pytest.raises(ConfigError, match="global_batch_size 8 is not a multiple of the 3"):
        recipe.data_parallel_size(12)
    assert recipe.data_parallel_size(8) == 2


def test_interleaved_stages_need_packs_in_multiples_of_their_number() -> None:
    recipe = Recipe().replaced(
        {
            "parallel.pipeline_model_parallel_size": 3,
            "parallel.virtual_pipeline_model_parallel_size": 2,
        }
    )
    with pytest.raises(
        ConfigError, match=r"gives 8 packs to each of 1 replicas; .* multiple of .* 3"
    ):
        recipe.data_parallel_size(3)
    recipe = recipe.replaced({"training.global_batch_size": 9})
    assert recipe.data_parallel_size(3) == 1


def test_help_lists_every_field_with_type_default_and_a_line() -> None:
    text = "\n".join(describe_fields())
    assert "optimizer.lr: float = 0.0001\n      Peak learning rate." in text

    def leaves(cls: type, prefix: str = "") -> list[str]:
        names = []
        for field in dataclasses.fields(cls):
            owner = field.default_factory
            assert field.metadata["doc"], field.name
            if isinstance(owner, type) and dataclasses.is_dataclass(owner):
                names += leaves(owner, f"{prefix}{field.name}.")
            else:
                names.append(prefix + field.name)
        return names

    for name in leaves(Recipe):
        assert f"  {name}: " in text


def test_the_entry_prints_help_and_fails_in_one_line(tmp_path: Path) -> None:
    def entry(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "pretrain_vita.py", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    shown = entry("--help")
    assert shown.returncode == 0
    assert "parallel.context_parallel_size: int = 1" in shown.stdout
    failed = entry(str(tmp_path / "none.yaml"))
    assert failed.returncode == 1
    assert failed.stderr.strip().endswith("cannot read the recipe: No such file or directory")
    assert len(failed.stderr.strip().splitlines()) == 1


def test_a_miniature_never_touches_the_copies_of_the_run(tmp_path: Path) -> None:
    recipe = Recipe().replaced({"checkpoint.mirror": "s3://runs/one", "checkpoint.save": "ours"})
    tiny = shrink(recipe, world_size=1, bf16=False, data=tmp_path)
    assert (tiny.checkpoint.mirror, tiny.checkpoint.save) == ("", "ours-tiny")


def test_a_miniature_in_fp32_has_an_optimizer_that_runs_everywhere(tmp_path: Path) -> None:
    types = [
        "exp_avg_dtype=bf16",
        "main_grads_dtype=bf16",
        "store_param_remainders=true",
        "lr=3e-5",
    ]
    settings = [*AWARE, *(f"optimizer.{setting}" for setting in types)]
    recipe = load_recipe(write(tmp_path, "format_version: 1"), settings)
    tiny, on_gpus = (
        shrink(recipe, world_size=1, bf16=bf16, data=tmp_path) for bf16 in (False, True)
    )
    assert tiny.optimizer == OptimizerConfig(lr=3e-5)
    assert on_gpus.optimizer == recipe.optimizer


@pytest.mark.parametrize(
    ("groups", "width", "ranks", "works"),
    [(8, 128, 4, True), (2, 128, 8, True), (5, 128, 8, False), (1, 2, 8, False)],
)
def test_tensor_parallel_ranks_split_or_share_key_heads(
    groups: int, width: int, ranks: int, works: bool
) -> None:
    fields = {"num_query_groups": groups, "num_attention_heads": 40, "kv_channels": width}
    tree = {
        "model": {"language": fields},
        "parallel": {"tensor_model_parallel_size": ranks},
    }
    if works:
        assert recipe_from_dict(tree).model.language.query_groups_of_rank(ranks) >= 1
        return
    with pytest.raises(ConfigError, match=f"num_query_groups {groups} is neither a multiple nor"):
        recipe_from_dict(tree)


def test_a_shared_key_head_is_not_split_over_context_parallel_ranks() -> None:
    parallel = {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "cp_comm_type": "a2a"}
    with pytest.raises(ConfigError, match="but a TP rank has 1; use p2p"):
        recipe_from_dict({"model": {"language": {"num_query_groups": 2}}, "parallel": parallel})


def test_replaced_changes_a_copy_and_leaves_the_recipe() -> None:
    recipe = Recipe()
    text = TextConfig(system="Be brief.")
    changes = {
        "text": text,
        "text.template": "plain",
        "model.vision.num_layers": 3,
        "optimizer.lr": 1,
    }
    other = recipe.replaced(changes)
    assert other.text == TextConfig(system="Be brief.", template="plain")
    assert (other.model.vision.num_layers, other.optimizer.lr) == (3, 1.0)
    assert (
        other.replaced({"text": TextConfig(), "model": ModelConfig(), "optimizer.lr": 1e-4})
        == recipe
    )
    assert recipe == Recipe()


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


def test_fields_that_depend_on_each_other_are_replaced_at_once() -> None:
    changes = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
    assert Recipe().replaced(changes).parallel.sequence_parallel


def test_no_group_of_a_recipe_can_be_assigned_to() -> None:
    def groups(group: Any) -> Iterator[Any]:
        yield group
        for field in dataclasses.fields(group):
            if dataclasses.is_dataclass(inner := getattr(group, field.name)):
                yield from groups(inner)

    data = DataConfig(train=[DatasetConfig(name="a", shards="a.tar")])
    for group in [*groups(Recipe()), *data.train, CallbackConfig(path="a.B")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, 1)


def test_a_served_layout_need_not_divide_packs_but_weights() -> None:
    parallel = ParallelConfig(context_parallel_size=3)
    with pytest.raises(ConfigError, match="document_alignment 16 is not a multiple of 6"):
        Recipe().replaced({"parallel": parallel})
    assert Recipe().with_layout(parallel).parallel.context_parallel_size == 3
    with pytest.raises(ConfigError, match="num_attention_heads 40 is not a multiple of"):
        Recipe().with_layout(ParallelConfig(tensor_model_parallel_size=3))


@pytest.mark.parametrize(
    ("available", "used"),
    [(8, 8), (7, 4), (6, 4), (4, 4), (3, 2), (2, 2)],
)
def test_an_elastic_job_uses_whole_replicas_that_divide_the_batch(
    available: int, used: int
) -> None:
    fields = {"parallel.tensor_model_parallel_size": 2, "training.global_batch_size": 8}
    recipe = Recipe().replaced(fields)
    assert recipe.ranks_in_use(available) == available
    assert recipe.replaced({"parallel.elastic": True}).ranks_in_use(available) == used


def test_an_elastic_job_of_less_than_a_replica_is_refused() -> None:
    fields = {"parallel.tensor_model_parallel_size": 4, "parallel.elastic": True}
    with pytest.raises(ConfigError, match="3 ranks are not a multiple of 4"):
        Recipe().replaced(fields).ranks_in_use(3)
