"""Miniature of a recipe: the same stage at toy size, for few processes and synthetic data."""

import math
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_vita.config.groups.data import DatasetConfig
from megatron_vita.config.groups.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_vita.config.groups.parallel import ParallelConfig
from megatron_vita.config.groups.text import TextConfig
from megatron_vita.config.parsing.build import replaced
from megatron_vita.config.recipe import Recipe

LENGTH_FACTOR = 64
LONGEST = 4096
FRAMES_FACTOR = 16
LAYERS = 4
STEPS = 4
SUFFIX = "-tiny"
FOLDERS = (
    "checkpoint.save",
    "checkpoint.load",
    "training.run_dir",
    "training.tensorboard_dir",
    "training.profile_dir",
)
"""Fields that get the suffix unless they are empty."""
VISION_KINDS = (
    *(
        "kind",
        "normalization",
        "qk_layernorm",
        "add_qkv_bias",
        "activation",
        "class_token",
        "patch_bias",
        "pre_norm",
    ),
    *("post_norm", "norm_after", "layer_scale"),
)
VOCABULARY = 512  # of the synthetic tokenizer, with room for special tokens


def shrink(recipe: Recipe, *, world_size: int, bf16: bool, data: Path) -> Recipe:
    """Shrink a recipe for `world_size` ranks, with data and tokenizer in the folder `data`.

    Kept are frozen and recomputed parts, attention between documents, learning rates, datasets and
    their ratios, and the kinds of parallelism for which there are enough ranks. Folders of plan and
    checkpoints are those of the recipe with `-tiny` appended.
    """
    parallel = _shrink_parallel(recipe.parallel, world_size)
    text = TextConfig(tokenizer=str(data / "tokenizer.model"), template=recipe.text.template)
    changes: dict[str, Any] = {
        "parallel": parallel,
        "model": _shrink_model(recipe.model, parallel),
        "text": text,
        "media.max_frames": max(2, recipe.media.max_frames // FRAMES_FACTOR),
        "data.seq_length": min(max(256, recipe.data.seq_length // LENGTH_FACTOR), LONGEST),
        "data.train": _shrink_datasets(recipe.data.train, data),
        "data.validation": _shrink_datasets(recipe.data.validation, data),
        "data.epochs": 64,
        "data.num_workers": min(recipe.data.num_workers, 1),
        "data.plan": recipe.data.plan + SUFFIX,
        "checkpoint.save_interval": STEPS // 2,
        "checkpoint.mirror": "",  # the real run's, from which this would resume
    }
    changes |= _shrink_schedule(recipe) | _shrink_training(recipe, parallel, world_size)
    for folder in FOLDERS:
        if path := attrgetter(folder)(recipe):
            changes[folder] = path + SUFFIX
    if not (recipe.training.bf16 and bf16):
        changes["training.bf16"] = False
        # The precision-aware optimizer needs bf16. Fields of the group above replace its own.
        changes["optimizer"] = recipe.optimizer.in_full_precision()
    return recipe.replaced(changes)


def _shrink_datasets(datasets: list[DatasetConfig], data: Path) -> list[DatasetConfig]:
    return [
        DatasetConfig(
            name=dataset.name, shards=str(data / dataset.name / "*.tar"), ratio=dataset.ratio
        )
        for dataset in datasets
    ]


def _shrink_parallel(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """Halve the sizes, the largest first, until a replica fits; reset options that need them."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {name: getattr(parallel, name) for name in names}
    # Halving keeps sizes powers of two if they were; the largest first keeps all kinds if it can.
    while world_size % math.prod(sizes.values()):
        largest = max(names, key=lambda name: sizes[name])
        sizes[largest] //= 2
    changes: dict[str, Any] = {"layout": "", **sizes}
    # Given numbers of layers are of the full model; the few layers of the miniature split evenly.
    changes |= {"num_layers_in_first_pipeline_stage": 0, "num_layers_in_last_pipeline_stage": 0}
    if sizes["pipeline_model_parallel_size"] == 1:
        changes["virtual_pipeline_model_parallel_size"] = 1
    if sizes["tensor_model_parallel_size"] == 1:
        changes |= {"sequence_parallel": False, "vision_tensor_parallel": False}
    has_other_cp = sizes["context_parallel_size"] != parallel.context_parallel_size
    if has_other_cp and parallel.cp_comm_type == "a2a+p2p":
        changes |= {"cp_comm_type": "p2p", "hierarchical_context_parallel_sizes": []}
    return replaced(parallel, changes)


def _shrink_model(model: ModelConfig, parallel: ParallelConfig) -> ModelConfig:
    chunks = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    # Interleaving needs a layer for each chunk, at least.
    layers = LAYERS
    if LAYERS % chunks:
        layers = chunks
    language = LanguageConfig(
        num_layers=layers,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=VOCABULARY,
        rotary_base=model.language.rotary_base,
        rope_scaling=model.language.rope_scaling,
        add_qkv_bias=model.language.add_qkv_bias,
        qk_layernorm=model.language.qk_layernorm,
        untie_embeddings_and_output_weights=model.language.untie_embeddings_and_output_weights,
    )
    small = VisionConfig(
        image_size=56, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4
    )
    vision = replaced(small, {name: getattr(model.vision, name) for name in VISION_KINDS})
    return replaced(model, {"language": language, "vision": vision})


def _shrink_schedule(recipe: Recipe) -> dict[str, Any]:
    """Lengths in proportion to the steps; at least one where there was one."""
    changes = {}
    for name in ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters"):
        if steps := getattr(recipe.optimizer, name):
            length = max(1, steps * STEPS // recipe.training.train_iters)
            changes[f"optimizer.{name}"] = min(length, STEPS - 1)
    return changes


def _shrink_training(recipe: Recipe, parallel: ParallelConfig, world_size: int) -> dict[str, Any]:
    training = recipe.training
    replicas = world_size // parallel.replica_size
    kept = training.recompute_keep_attention_layers
    return {
        "training.train_iters": STEPS,
        "training.log_interval": 1,
        # A multiple of the stages for each replica, as interleaved schedules need it.
        "training.global_batch_size": 2 * replicas * parallel.pipeline_model_parallel_size,
        "training.recompute_num_layers": min(training.recompute_num_layers, 1),
        "training.recompute_keep_attention_layers": min(kept, 1),
        "training.eval_interval": min(training.eval_interval, STEPS // 2),
        "training.eval_iters": 1,
        # Matrices of the miniature are smaller than the blocks of 8-bit products.
        "training.fp8_recipe": "none",
    }
