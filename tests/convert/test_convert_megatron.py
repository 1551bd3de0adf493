"""Megatron's checkpoints come in: a file for each rank, as Long-VITA publishes them, and
megatron-core's own."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import ModelConfig, ParallelConfig, load_recipe, recipe_from_dict
from megatron_vita.convert.__main__ import run as main
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.families.mapping import location_of
from megatron_vita.convert.formats.tensors import same_bits
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.importing import import_weights
from megatron_vita.convert.megatron import import_megatron
from megatron_vita.errors import CheckpointError
from megatron_vita.model.backends.norm import RMSNorm
from megatron_vita.parallel import groups
from tests.convert.toy_folders import VOCAB, model_of, save, save_vision, tensors_of

HEADS = 4
GROUPS = 2
LAYERS = 2
WIDTH = 32


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a vocabulary of 97 rows, which two ranks do not divide."""
    folder = tmp_path_factory.mktemp("ours")
    llm = save(model_of("qwen2"), folder / "llm")
    vit = save_vision(folder / "vit")
    import_weights([llm, vit], folder / "ours", projector="long_vita")
    return folder / "ours"


def shapes_of(checkpoint: Path) -> ModelConfig:
    return recipe_from_dict(store.read_manifest(checkpoint)["recipe"]).model


def our_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of our checkpoint under the names of single layers."""
    source = DistSource(checkpoint)
    found = {}
    for key, info in source.infos.items():
        if "decoder.layers." in key:
            for i in range(info.shape[0]):
                name = key.replace("decoder.layers.", f"decoder.layers.{i}.")
                found[name] = source.read(location_of(name)).clone()
        else:
            found[key] = source.read(location_of(key)).clone()
    return found


def megatron_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The same tensors under Long-VITA's Megatron names, unsharded."""
    renamed = {
        "embeddings.class_token": "vision_model.class_token",
        "embeddings.position_embedding": "vision_model.position_embeddings.weight",
        "embeddings.patch_embedding": "vision_model.conv1",
        "layers.": "vision_model.decoder.layers.", "attention.qkv": "self_attention.linear_qkv",
        "attention.projection": "self_attention.linear_proj", "mlp.fc": "mlp.linear_fc", "scale": "ls",
        "norm1.weight": "input_layernorm.weight", "norm1.bias": "input_layernorm.bias",
        "norm2.weight": "pre_mlp_layernorm.weight", "norm2.bias": "pre_mlp_layernorm.bias",
    }  # fmt: skip
    found = {}
    for name, tensor in our_tensors(checkpoint).items():
        part, rest = name.split(".", 1)
        if part == "language_model":
            found[rest] = tensor
        elif part == "projector":
            rest = rest.replace("norm.", "pre_proj_layernorm.").replace("fc", "encoder.linear_fc")
            found[f"external_feature_model.vision_projection.{rest}"] = tensor
        else:
            for mine, theirs in renamed.items():
                rest = rest.replace(mine, theirs)
            if "position" in rest:
                tensor = tensor[0]
            if "linear_qkv" in rest:  # of each head in turn: query, key, value
                size = WIDTH // HEADS
                rows = [
                    x * WIDTH + h * size + d
                    for h in range(HEADS)
                    for x in range(3)
                    for d in range(size)
                ]
                tensor = tensor.flatten(0, 1)[rows]
            found[f"external_feature_model.{rest}"] = tensor
    return found


def share(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Shard of a tensor-parallel rank."""
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        rows = -(-len(tensor) // ranks)
        padded = F.pad(tensor, (0, 0, 0, rows * ranks - len(tensor)))
        return padded[rank * rows : (rank + 1) * rows].clone()
    if "linear_fc1" in name and "layer_norm" not in name and "external" not in name:
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    if name.endswith(
        ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
    ):
        return tensor.chunk(ranks)[rank].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(ranks, dim=1)[rank].clone()
    return tensor


def write_ranks(tensors: dict[str, Tensor], folder: Path, *, tp: int, pp: int = 1) -> Path:
    """Write one file per rank as Megatron does: a stage's layers are counted from 0, the embedding
    is on the first stage and the output layer on the last."""
    iteration = folder / "iter_0000012"
    per_stage = LAYERS // pp
    for stage in range(pp):
        for rank in range(tp):
            model = {"unused": torch.ones(4), "decoder.layers.0.self_attention._extra_state": None}
            for name, tensor in tensors.items():
                layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
                if layer is not None and layer // per_stage != stage:
                    continue
                ends = {0: ("embedding", "external"), pp - 1: ("decoder.final", "output")}
                if layer is None and not name.startswith(ends.get(stage, ()) if pp > 1 else ("",)):
                    continue
                if layer is None:
                    new = name
                else:
                    new = name.replace(f".{layer}.", f".{layer % per_stage}.", 1)
                model[new] = share(name, tensor, rank, tp)
            path = iteration / (
                f"mp_rank_{rank:02d}" if pp == 1 else f"mp_rank_{rank:02d}_{stage:03d}"
            )
            path.mkdir(parents=True)
            args = argparse.Namespace(num_layers=LAYERS, bf16=True)
            torch.save(
                {"args": args, "checkpoint_version": 3.0, "iteration": 12, "model": model},
                path / "model_optim_rng.pt",
            )
    (folder / "latest_checkpointed_iteration.txt").write_text("12")
    return folder


def recipe_file(checkpoint: Path, folder: Path, **changes: object) -> Path:
    model = dataclasses.asdict(shapes_of(checkpoint)) | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    return path


def assert_same_checkpoint(one: Path, other: Path, *, parts: tuple[str, ...] = ("",)) -> None:
    before = our_tensors(one)
    after = our_tensors(other)
    before = {name: tensor for name, tensor in before.items() if name.startswith(parts)}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert same_bits(tensor, after[name]), name


def test_long_vita_ranks_come_in(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ranks = write_ranks(megatron_tensors(ours), tmp_path / "ranks", tp=2)
    recipe = recipe_file(ours, tmp_path)
    tokenizer = ours / "hugging_face" / "causal"
    command = ["from-megatron", str(ranks), str(tmp_path / "ours"), "--recipe", str(recipe)]
    assert main([*command, "--tokenizer", str(tokenizer)]) == 0, capsys.readouterr().err
    assert_same_checkpoint(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / "hugging_face" / "causal" / "tokenizer.json").exists()


def test_pipeline_ranks_of_a_gpt_model_come_in(ours: Path, tmp_path: Path) -> None:
    language = {
        name: t for name, t in megatron_tensors(ours).items() if not name.startswith("external")
    }
    ranks = write_ranks(language, tmp_path / "ranks", tp=2, pp=2)
    recipe = load_recipe(recipe_file(ours, tmp_path, text_only=True))
    import_megatron(ranks, tmp_path / "ours", recipe=recipe, tokenizer=None)
    assert_same_checkpoint(ours, tmp_path / "ours", parts=("language_model.",))


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda d: torch.save({"model": {"x": Code()}}, d / "mp_rank_01" / "model_optim_rng.pt"),
            "not run",
        ),
        (lambda d: (d / "mp_rank_00").rename(d / "mp_rank_02"), "no tensor-parallel rank 0"),
        (lambda d: os.truncate(d / "mp_rank_01" / "model_optim_rng.pt", 1000), "mp_rank_01"),
        (lambda d: edit(d, lambda t: t.pop("output_layer.weight")), "rank 1 has not"),
        (
            lambda d: edit(d, lambda t: t["decoder.final_layernorm.weight"].add_(1)),
            "differs between",
        ),
    ],
)
def test_damaged_ranks_are_refused_by_file(
    ours: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    ranks = write_ranks(megatron_tensors(ours), tmp_path / "ranks", tp=2)
    damage(ranks / "iter_0000012")
    recipe = load_recipe(recipe_file(ours, tmp_path))
    with pytest.raises(CheckpointError, match=said) as error:
        import_megatron(ranks, tmp_path / "ours", recipe=recipe, tokenizer=None)
    assert str(ranks) in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks", "recipe.yaml"]
    assert not Path("ran").exists()


def edit(iteration: Path, change: Callable[[dict], object]) -> None:
    file = iteration / "mp_rank_01" / "model_optim_rng.pt"
    loaded = torch.load(file, weights_only=False)
    change(loaded["model"])
    torch.save(loaded, file)


def gpt_model() -> GPTModel:
    """megatron-core's own GPTModel with the shapes of toy_folders' qwen2, by its public API alone."""
    platform.initialize_process()
    groups.initialize_groups(ParallelConfig())
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, ffn_hidden_size=64, num_attention_heads=HEADS, num_query_groups=GROUPS,
        add_qkv_bias=True, add_bias_linear=False, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=F.silu, layernorm_epsilon=1e-6, hidden_dropout=0.0, attention_dropout=0.0,
        attention_backend=AttnBackend.fused, use_cpu_initialization=True, bias_activation_fusion=False,
        masked_softmax_fusion=False,
    )  # fmt: skip
    layer = get_gpt_layer_local_submodules(normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    block = TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=TransformerLayer, submodules=layer)] * LAYERS,
        layer_norm=RMSNorm,
    )
    return GPTModel(
        config, transformer_layer_spec=block, vocab_size=VOCAB, max_sequence_length=64, position_embedding_type="rope",
        share_embeddings_and_output_weights=False, rotary_base=1_000_000,
    )  # fmt: skip


def sharded(model: GPTModel) -> dict:
    state = model.sharded_state_dict(metadata=store.sharding_metadata())
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def test_megatron_core_loads_what_is_written_and_what_it_saves_comes_in(
    ours: Path, tmp_path: Path
) -> None:
    assert main(["to-megatron", str(ours), str(tmp_path / "core")]) == 0
    model = gpt_model()
    state = dist_checkpointing.load(
        sharded(model), str(tmp_path / "core"), strict=StrictHandling.RAISE_ALL
    )
    model.load_state_dict(state, strict=False)
    ids = torch.arange(24)[None]
    logits = model(ids, ids, torch.ones(1, 1, 24, 24).triu(1).bool())
    torch.testing.assert_close(
        logits, model_of("qwen2")(input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )

    (tmp_path / "saved").mkdir()
    dist_checkpointing.save(sharded(model), str(tmp_path / "saved"), async_strategy="mcore")
    recipe = load_recipe(recipe_file(ours, tmp_path, text_only=True))
    import_megatron(tmp_path / "saved", tmp_path / "ours", recipe=recipe, tokenizer=None)
    assert_same_checkpoint(ours, tmp_path / "ours", parts=("language_model.",))


def test_long_vitas_hugging_face_layout_is_kept(ours: Path, tmp_path: Path) -> None:
    export_checkpoint(ours, tmp_path / "theirs")
    names = tensors_of(tmp_path / "theirs").keys()
    assert {
        "model.vision_projection.mlp.0.weight",
        "model.vision_model.encoder.layers.1.attn.qkv.weight",
    } <= names
    import_weights([tmp_path / "theirs"], tmp_path / "again", projector="internvl")
    assert_same_checkpoint(ours, tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "thrice")
    assert (tmp_path / "theirs" / "config.json").read_bytes() == (
        tmp_path / "thrice" / "config.json"
    ).read_bytes()
