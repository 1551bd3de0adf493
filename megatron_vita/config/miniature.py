"""Miniature of a recipe: the same stage at toy size, for few processes and synthetic data."""

import copy
from dataclasses import replace
from pathlib import Path

from megatron_vita.config.data import DatasetConfig
from megatron_vita.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.config.recipe import Recipe
from megatron_vita.config.text import TextConfig

LENGTH_FACTOR = 64
LONGEST = 4096
FRAMES_FACTOR = 16
LAYERS = 4
STEPS = 4
SUFFIX = "-tiny"
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
    tiny = copy.deepcopy(recipe)
    tiny.parallel = _shrink_parallel(recipe.parallel, world_size)
    tiny.model = _shrink_model(recipe.model, tiny.parallel)
    tiny.text = TextConfig(tokenizer=str(data / "tokenizer.model"), template=recipe.text.template)
    tiny.media.max_frames = max(2, recipe.media.max_frames // FRAMES_FACTOR)
    tiny.data.seq_length = min(max(256, recipe.data.seq_length // LENGTH_FACTOR), LONGEST)
    tiny.data.train = _shrink_datasets(recipe.data.train, data)
    tiny.data.validation = _shrink_datasets(recipe.data.validation, data)
    tiny.data.epochs = 64
    tiny.data.num_workers = min(recipe.data.num_workers, 1)
    _shrink_training(tiny, world_size=world_size, bf16=bf16)
    tiny.data.plan = recipe.data.plan + SUFFIX
    for field in ("save", "load"):
        if folder := getattr(recipe.checkpoint, field):
            setattr(tiny.checkpoint, field, folder + SUFFIX)
    tiny.checkpoint.save_interval = STEPS // 2
    # Fields were assigned one by one: check the groups that changed, then the recipe as a whole.
    for part in (tiny.parallel, tiny.training, tiny.data, tiny):
        part.__post_init__()
    return tiny


def _shrink_datasets(datasets: list[DatasetConfig], data: Path) -> list[DatasetConfig]:
    return [
        DatasetConfig(
            name=dataset.name, shards=str(data / dataset.name / "*.tar"), ratio=dataset.ratio
        )
        for dataset in datasets
    ]


def _shrink_parallel(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """Halve the sizes, the largest first, until a replica fits; reset options that need them."""
    tiny = copy.deepcopy(parallel)
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"]
    # Halving keeps sizes powers of two if they were; the largest first keeps all kinds if it can.
    while tiny.replica_size > world_size or world_size % tiny.replica_size:
        largest = max(names, key=lambda name: getattr(tiny, name))
        setattr(tiny, largest, getattr(tiny, largest) // 2)
    # Given numbers of layers are of the full model; the few layers of the miniature split evenly.
    tiny.num_layers_in_first_pipeline_stage = tiny.num_layers_in_last_pipeline_stage = 0
    if tiny.pipeline_model_parallel_size == 1:
        tiny.virtual_pipeline_model_parallel_size = 1
    if tiny.tensor_model_parallel_size == 1:
        tiny.sequence_parallel = tiny.vision_tensor_parallel = False
    if (
        tiny.context_parallel_size != parallel.context_parallel_size
        and tiny.cp_comm_type == "a2a+p2p"
    ):
        tiny.cp_comm_type = "p2p"
        tiny.hierarchical_context_parallel_sizes = []
    return tiny


def _shrink_model(model: ModelConfig, parallel: ParallelConfig) -> ModelConfig:
    tiny = copy.deepcopy(model)
    chunks = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    # Interleaving needs a layer for each chunk, at least.
    layers = LAYERS
    if LAYERS % chunks:
        layers = chunks
    tiny.language = LanguageConfig(
        num_layers=layers,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=VOCABULARY,
        rotary_base=model.language.rotary_base,
        rope_scaling=copy.deepcopy(model.language.rope_scaling),
        add_qkv_bias=model.language.add_qkv_bias,
        qk_layernorm=model.language.qk_layernorm,
        untie_embeddings_and_output_weights=model.language.untie_embeddings_and_output_weights,
    )
    small = VisionConfig(
        image_size=56, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4
    )
    tiny.vision = replace(small, **{name: getattr(model.vision, name) for name in VISION_KINDS})
    return tiny


def _shrink_schedule(tiny: Recipe) -> None:
    """Lengths in proportion to the steps; at least one where there was one."""
    for name in ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters"):
        if steps := getattr(tiny.optimizer, name):
            length = max(1, steps * STEPS // tiny.training.train_iters)
            setattr(tiny.optimizer, name, min(length, STEPS - 1))


def _shrink_training(tiny: Recipe, *, world_size: int, bf16: bool) -> None:
    training = tiny.training
    parallel = tiny.parallel
    _shrink_schedule(tiny)
    replicas = world_size // parallel.replica_size
    training.train_iters = STEPS
    training.log_interval = 1
    # A multiple of the stages for each replica, as interleaved schedules need it.
    training.global_batch_size = 2 * replicas * parallel.pipeline_model_parallel_size
    training.recompute_num_layers = min(training.recompute_num_layers, 1)
    training.recompute_keep_attention_layers = min(training.recompute_keep_attention_layers, 1)
    training.eval_interval = min(training.eval_interval, STEPS // 2)
    training.eval_iters = 1
    training.bf16 = training.bf16 and bf16
    # The precision-aware optimizer needs bf16.
    if not training.bf16:
        tiny.optimizer = tiny.optimizer.in_full_precision()
    for name in ("run_dir", "tensorboard_dir", "profile_dir"):
        if folder := getattr(training, name):
            setattr(training, name, folder + SUFFIX)
