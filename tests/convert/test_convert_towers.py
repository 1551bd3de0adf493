"""Vision towers imported with a language model give the features, gradients and round trips of
their original libraries."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import DataConfig, Recipe, VisionConfig, recipe_from_dict
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.costs.memory.parameters import model_parameters
from megatron_vita.model.build import build_model
from megatron_vita.model.vision import VisionTower, pixel_shuffle
from megatron_vita.parallel import groups
from tests.convert.toy_folders import (
    TILE,
    TOWERS,
    model_of,
    randomize,
    save,
    save_whole_clip,
    tensors_of,
    tower_of,
)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model_of("qwen2"), tmp_path_factory.mktemp("language") / "llm")


def bring_in(tower: Path, language: Path, to: Path) -> tuple[VisionTower, Recipe]:
    """Import a tower with a language model, and build it with the written weights."""
    import_weights([language, tower], to, projector="long_vita")
    platform.initialize_process()
    recipe = recipe_from_dict(store.read_manifest(to)["recipe"])
    recipe = recipe.replaced({"data": DataConfig(seq_length=64), "training.bf16": False})
    groups.initialize_groups(recipe.parallel)
    model = build_model(recipe)
    store.load_weights([model], to)
    assert sum(p.numel() for p in model.parameters()) == model_parameters(recipe.model)
    return model.vision_model, recipe


def joined(hidden: Tensor, *, class_token: bool) -> Tensor:
    """Merge patches of last hidden states [n, s, C] two by two into features, cell by cell."""
    patches = hidden[:, 1:] if class_token else hidden
    side = math.isqrt(patches.shape[1])
    grid = patches.unflatten(1, (side, side))
    zero = torch.zeros_like(grid[:, 0, 0])

    def at(row: int, column: int) -> Tensor:
        if row < side and column < side:
            return grid[:, row, column]
        return zero

    corners = [(r, c) for r in range(0, side, 2) for c in range(0, side, 2)]
    cells = [
        torch.cat([at(r, c), at(r, c + 1), at(r + 1, c), at(r + 1, c + 1)], dim=-1)
        for r, c in corners
    ]
    return torch.stack(cells, dim=1)


def assert_same_features_and_gradients(tower: VisionTower, expected: Tensor, tiles: Tensor) -> None:
    """Compare features, and gradients with respect to the tiles, which pass through the whole
    tower."""
    mine = tiles.detach().clone().requires_grad_()
    actual = tower(mine)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * target).sum().backward()
    (actual * target).sum().backward()
    assert (mine.grad - tiles.grad).norm() <= 1e-5 * tiles.grad.norm()


def random_tiles(size: int = TILE) -> Tensor:
    return torch.randn(
        3, 3, size, size, generator=torch.Generator().manual_seed(4)
    ).requires_grad_()


@pytest.mark.parametrize("name", TOWERS)
def test_features_gradients_and_round_trip(name: str, language: Path, tmp_path: Path) -> None:
    theirs = tower_of(name).eval()
    theirs.save_pretrained(tmp_path / "tower")
    tower, recipe = bring_in(tmp_path / "tower", language, tmp_path / "ours")
    tiles = random_tiles(recipe.model.vision.image_size)
    hidden = theirs(pixel_values=tiles).last_hidden_state
    assert_same_features_and_gradients(
        tower, joined(hidden, class_token="siglip" not in name), tiles
    )
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert tower.embeddings.patch_embedding.weight.grad is not None
    (patch,) = (
        grad
        for n, grad in grads.items()
        if n.endswith(("patch_embedding.weight", "projection.weight"))
    )
    torch.testing.assert_close(
        tower.embeddings.patch_embedding.weight.grad, patch, atol=1e-4, rtol=1e-5
    )

    folder_format = "internvit-hf" if "internvit" in name else name.split("-")[0]
    export_checkpoint(tmp_path / "ours", tmp_path / "again", folder_format=folder_format)
    before = tensors_of(tmp_path / "tower")
    after = tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    configs = [
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("tower", "again")
    ]
    assert configs[0] == configs[1]
    loaded, report = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(loaded.eval()(pixel_values=tiles).last_hidden_state, hidden)


def test_a_tower_is_taken_out_of_a_whole_clip(language: Path, tmp_path: Path) -> None:
    whole = save_whole_clip(tmp_path / "clip").eval()
    tower, _ = bring_in(tmp_path / "clip", language, tmp_path / "ours")
    tiles = random_tiles()
    hidden = whole.vision_model(pixel_values=tiles).last_hidden_state
    assert_same_features_and_gradients(tower, joined(hidden, class_token=True), tiles)
    export_checkpoint(tmp_path / "ours", tmp_path / "again", folder_format="clip-prefixed")
    before = tensors_of(tmp_path / "clip")
    after = tensors_of(tmp_path / "again")
    assert after.keys() == {name for name in before if name.startswith("vision_model.")}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    loaded = CLIPVisionModel.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(loaded(pixel_values=tiles).last_hidden_state, hidden)


def test_a_prefixed_siglip_tower_keeps_its_prefix(language: Path, tmp_path: Path) -> None:
    """transformers 4 wrote `vision_model.` before all names."""
    theirs = tower_of("siglip")
    theirs.save_pretrained(tmp_path / "tower")
    tensors = {
        f"vision_model.{name}": tensor for name, tensor in tensors_of(tmp_path / "tower").items()
    }
    save_file(tensors, tmp_path / "tower" / "model.safetensors")
    bring_in(tmp_path / "tower", language, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again", folder_format="siglip-prefixed")
    after = tensors_of(tmp_path / "again")
    assert after.keys() == tensors.keys()
    loaded = SiglipVisionModel.from_pretrained(tmp_path / "again")
    assert all(torch.equal(p, theirs.state_dict()[n]) for n, p in loaded.state_dict().items())


class Eva(nn.Module):
    """EVA2-CLIP in plain PyTorch: a norm at the end of each branch, and a fused query-key-value
    matrix."""

    def __init__(self) -> None:
        super().__init__()
        width = 32
        ffn = 64
        patches = (TILE // 14) ** 2
        shapes = {
            "patch_embedding.proj.weight": (width, 3, 14, 14),
            "patch_embedding.proj.bias": (width,),
        }
        shapes |= {"patch_embedding.cls_embedding": (1, width)}
        shapes |= {"patch_embedding.position_embedding.weight": (patches + 1, width)}
        for i in range(2):
            linear = {
                "attention.query_key_value": (3 * width, width),
                "attention.dense": (width, width),
            }
            linear |= {"mlp.fc1": (ffn, width), "mlp.fc2": (width, ffn)}
            for name, shape in linear.items():
                shapes[f"transformer.layers.{i}.{name}.weight"] = shape
                shapes[f"transformer.layers.{i}.{name}.bias"] = shape[:1]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes |= {
                    f"transformer.layers.{i}.{norm}.{kind}": (width,) for kind in ("weight", "bias")
                }
        self.weights = nn.ParameterDict(
            {n.replace(".", "|"): nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
        )
        randomize(self)

    def forward(self, tiles: Tensor) -> Tensor:
        w = {name.replace("|", "."): p for name, p in self.weights.items()}
        x = F.conv2d(
            tiles, w["patch_embedding.proj.weight"], w["patch_embedding.proj.bias"], stride=14
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w["patch_embedding.cls_embedding"].expand(len(x), 1, -1), x], dim=1)
        x = x + w["patch_embedding.position_embedding.weight"]
        for i in range(2):
            p = {
                n.removeprefix(f"transformer.layers.{i}."): t
                for n, t in w.items()
                if f"layers.{i}." in n
            }
            qkv = F.linear(
                x, p["attention.query_key_value.weight"], p["attention.query_key_value.bias"]
            )
            q, k, v = qkv.view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
            mixed = (scores @ v).transpose(1, 2).flatten(2)
            out = F.linear(mixed, p["attention.dense.weight"], p["attention.dense.bias"])
            x = x + F.layer_norm(
                out, (32,), p["input_layernorm.weight"], p["input_layernorm.bias"], 1e-6
            )
            out = F.gelu(F.linear(x, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
            out = F.linear(out, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
            norm = p["post_attention_layernorm.weight"], p["post_attention_layernorm.bias"]
            x = x + F.layer_norm(out, (32,), *norm, 1e-6)
        return x


def test_eva_is_taken_out_of_a_glm_folder(language: Path, tmp_path: Path) -> None:
    eva = Eva()
    folder = tmp_path / "glm"
    folder.mkdir()
    tensors = {
        f"transformer.vision.{n.replace('|', '.')}": t.detach() for n, t in eva.weights.items()
    }
    save_file(
        tensors | {"transformer.vision.linear_proj.gate_proj.weight": torch.ones(2)},
        folder / "model.safetensors",
    )
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "in_channels": 3,
    }
    vision |= {
        "image_size": TILE,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_positions": 17,
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "chatglm", "vision_config": vision})
    )
    tower, _ = bring_in(folder, language, tmp_path / "ours")
    tiles = random_tiles()
    assert_same_features_and_gradients(tower, joined(eva(tiles), class_token=True), tiles)
    export_checkpoint(tmp_path / "ours", tmp_path / "again", folder_format="eva")
    after = tensors_of(tmp_path / "again")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())


def test_an_odd_grid_is_padded_with_zeros_at_its_right_and_bottom() -> None:
    patches = torch.arange(9.0).view(1, 9, 1) + 1
    expected = torch.tensor([[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]).float()
    assert torch.equal(pixel_shuffle(patches)[0], expected)
    assert (
        VisionConfig(image_size=384, patch_size=14, ragged_grid=True).image_token_length == 14 * 14
    )
