"""Preparation of a stage: samples, the model to start from, shards, indexes, plan.

Every step is kept once it is done; the same versions of Python and packages give the same files.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from data_tools.planning import index_shards, write_plans
from data_tools.sharding import ShardJob, make_shards
from data_tools.workers.pool import IN_PROCESS, WorkerOptions
from examples.commands import run
from examples.four_stages.heldout import FULL_TESTS, MINIATURE_TESTS, write_tests
from examples.four_stages.made import write_set
from examples.four_stages.material import GGUF, find_material
from examples.four_stages.run_folder import RunFolder
from examples.four_stages.sets import FULL, MINIATURE, Amounts, sample_set
from megatron_vita.config import DatasetConfig, Recipe, VisionConfig
from megatron_vita.files import publish

logger = logging.getLogger(__name__)
TOWER_SEED = 0
SHARDS = 64  # of a set, for as many workers
MOST_SAMPLES = 500  # of a shard
SAMPLES_SHOWN = 4  # of each set, on the page of statistics
SETS_OF_MATERIAL = {"stamps": "stamps", "clips": "clips"}
"""Folder of the material that a set is made of."""


def prepare(run_folder: RunFolder, stage: int, *, material: Path, overrides: Sequence[str]) -> None:
    """Make of a stage's sets what its training reads: the weights to start from, shards, plan.

    Args:
        material: folder of the packages' files, fetched where missing.
        overrides: fields of the recipe, for the plan.

    Raises:
        DataError: a package is missing and cannot be fetched.
    """
    write_start(run_folder, material=material)
    recipe = run_folder.recipe(stage, tuple(overrides))
    for dataset in recipe.data.train:
        shard(dataset)
    index_shards(recipe, options=IN_PROCESS if run_folder.miniature else WorkerOptions())
    for line in write_plans(recipe, strict=True):
        logger.info("%s", line)
    write_statistics(recipe, title=f"stage {stage}", out=run_folder.statistics(stage))


def shard(dataset: DatasetConfig) -> None:
    """Write the shards of a set; finished ones are kept."""
    jsonl = Path(dataset.jsonl)
    with jsonl.open("rb") as file:
        samples = sum(1 for _ in file)
    # Workers take a shard each: sets of some hundred long films are divided, too.
    size = MOST_SAMPLES
    if samples >= SHARDS:
        size = min(samples // SHARDS, MOST_SAMPLES)
    job = ShardJob(
        files=[jsonl],
        media_root=Path(dataset.media),
        out=Path(dataset.shards).parent,
        samples_per_shard=size,
        strict=True,
    )
    make_shards(job, options=worker_options(samples))


def worker_options(samples: int) -> WorkerOptions:
    """Worker processes for a number of samples: none for a few, since they take seconds to start."""
    return WorkerOptions() if samples >= SHARDS else IN_PROCESS


def write_statistics(recipe: Recipe, *, title: str, out: Path) -> None:
    """Write the page of statistics of a stage's data, unless it is there."""
    if out.exists():
        return
    from data_tools.report import write_report

    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(recipe, title=title, out=out, samples=SAMPLES_SHOWN)


def amounts_of(run_folder: RunFolder) -> Amounts:
    """Samples of each set."""
    return MINIATURE if run_folder.miniature else FULL


def write_training_sets(run_folder: RunFolder, stage: int, *, material: Path) -> None:
    """Write the JSONL and the media of the sets of a stage's recipe."""
    for dataset in run_folder.recipe(stage).data.train:
        if dataset.name in SETS_OF_MATERIAL:
            find_material(SETS_OF_MATERIAL[dataset.name], material)
        made = sample_set(dataset.name, amounts_of(run_folder), material=material)
        write_set(dataset.name, count=made.count, maker=made.maker, folder=run_folder.data)


def write_held_out(run_folder: RunFolder, *, material: Path) -> None:
    """Write the questions of the tests, unless they are there."""
    done = run_folder.tests / "done"
    if done.exists():
        return
    find_material("stamps", material)
    tests = MINIATURE_TESTS if run_folder.miniature else FULL_TESTS
    write_tests(tests, amounts_of(run_folder), material=material, folder=run_folder.tests)
    done.touch()


def write_start(run_folder: RunFolder, *, material: Path) -> None:
    """Write the weights and the tokenizer that stage 1 starts from; a miniature has no weights."""
    if run_folder.miniature:
        _train_tokenizer(run_folder)
    elif not run_folder.start.exists():
        gguf = find_material("smollm2", material) / GGUF
        tower = run_folder.folder / "tower"
        # Kept where an earlier conversion failed.
        if not tower.exists():
            write_tower(run_folder.recipe(1).model.vision, tower)
        parts = [str(gguf), str(tower), str(run_folder.start)]
        run(
            "-m",
            "megatron_vita",
            "convert",
            "from-hf",
            *parts,
            "--projector",
            "long_vita",
            threads=8,
        )


def _train_tokenizer(run_folder: RunFolder) -> None:
    model = run_folder.folder / "tokenizer.model"
    if not model.exists():
        texts = [str(run_folder.data / f"{name}.jsonl") for name in ("pages", "words")]
        sizes = ("--out", str(model), "--vocab-size", "400")
        run("-m", "data_tools", "tokenizer", *texts, *sizes)


def write_tower(vision: VisionConfig, folder: Path) -> None:
    """Write a vision tower with initial weights, as a folder of transformers."""
    # Imported here: they take seconds, and most runs find the weights there.
    import torch
    from safetensors.torch import save_file
    from transformers import InternVLVisionConfig, InternVLVisionModel

    side = [vision.image_size, vision.image_size]
    config = InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        intermediate_size=vision.ffn_hidden_size,
        image_size=side,
        patch_size=[vision.patch_size, vision.patch_size],
        attention_bias=vision.add_qkv_bias,
        layer_norm_eps=vision.layernorm_epsilon,
        layer_scale_init_value=vision.layer_scale_init,
    )
    torch.manual_seed(TOWER_SEED)
    model = InternVLVisionModel(config)
    partial = folder.with_name(f".{folder.name}.incomplete")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(config.to_json_string())
    publish(partial, folder)
