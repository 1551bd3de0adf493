"""The Python interface as docs/api.md shows it: its examples run, and do what the page says."""

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import megatron_vita
from data_tools.cli import main as data_tools
from megatron_vita import registry
from megatron_vita.evaluation.grading import METRICS
from megatron_vita.model.vision import VisionTower
from tests.convert.toy_folders import SHAPE, add_companions, model_of, randomize, save, theta
from tests.environment import ROOT, environment_with
from tests.functional.toy_run import make_toy_run
from tests.inference.tiny import picture, video

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the page's examples read: a recipe with data, a Hugging Face folder, media."""
    folder = tmp_path_factory.mktemp("api")
    recipe = yaml.safe_load(make_toy_run(folder).read_text())
    recipe["training"]["eval_interval"] = 0
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = model_of("internvl-hf")
    model.config.text_config.max_position_embeddings = 256
    save(model, folder / "InternVL3-1B")
    (folder / "cat.png").write_bytes(picture(1).data)
    (folder / "clip.mp4").write_bytes(video().data)
    return folder


@pytest.fixture(scope="module")
def names(folder: Path) -> Iterator[dict[str, Any]]:
    """The names that all examples of the page define, run one after the other."""
    before = {kind: dict(entries) for kind, entries in registry._added.items()}
    found: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCK.findall((ROOT / "docs" / "api.md").read_text()):
            assert len([line for line in block.splitlines() if line.strip()]) <= 14
            exec(compile(block, "docs/api.md", "exec"), found)
        yield found
    for kind, entries in before.items():
        registry._added[kind] = entries


def test_a_trained_recipe_has_the_callbacks_metric_and_a_checkpoint(
    names: dict[str, Any], folder: Path
) -> None:
    assert (folder / "checkpoints" / "step_00000002").is_dir()
    assert names["recipe"].training.train_iters == 2


def test_packs_are_a_sequence_of_batches(names: dict[str, Any]) -> None:
    assert len(names["packs"]) > 1
    batch = names["batch"]
    assert len(batch.input_ids) == 256
    assert len(batch.sample_keys) == (batch.document_sources >= 0).sum() > 1
    assert len(batch.tiles) == len(batch.placements) > 0


def test_what_was_converted_loads_in_transformers(names: dict[str, Any], folder: Path) -> None:
    first = transformers.AutoModelForImageTextToText.from_pretrained(folder / "InternVL3-1B")
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder / "published")
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.usefixtures("names")
def test_a_registered_data_format_is_imported(tmp_path: Path) -> None:
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["what?", "that"]])
    out = tmp_path / "out.jsonl"
    command = ["import", "csv", str(tmp_path), "--out", str(out), "--workers", "0"]
    assert data_tools(command) == 0
    assert '"content": "that"' in out.read_text()


def test_a_registered_tower_is_the_recipes(names: dict[str, Any]) -> None:
    from megatron_vita.config import VisionConfig
    from megatron_vita.errors import ConfigError
    from megatron_vita.model.vision import build_tower

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_layers": 1, "hidden_size": 16}
    sizes |= {"ffn_hidden_size": 32, "num_attention_heads": 2}
    tower = build_tower(VisionConfig(kind="with_mean", **sizes))
    plain = VisionTower(VisionConfig(**sizes))
    assert isinstance(tower, names["TowerWithMean"])
    for each in (tower, plain):
        each.initialize(torch.Generator().manual_seed(1))
    rows = plain(torch.ones(2, 3, 16, 16))
    wanted = rows + rows.mean(dim=1, keepdim=True)
    torch.testing.assert_close(tower(torch.ones(2, 3, 16, 16)), wanted)
    with pytest.raises(ConfigError, match=r"kind is 'swin'; known: vit, with_mean"):
        build_tower(VisionConfig(kind="swin", **sizes))


@pytest.mark.usefixtures("names")
def test_a_registered_family_comes_in_and_goes_out(tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        **SHAPE, **theta(1e6), head_dim=8, sliding_window=None, tie_word_embeddings=False
    )
    model = transformers.MistralForCausalLM(config)
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    add_companions(tmp_path / "theirs", media=False)
    megatron_vita.from_hf(tmp_path / "theirs", tmp_path / "ours")
    megatron_vita.to_hf(tmp_path / "ours", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert isinstance(again, transformers.MistralForCausalLM)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_registered_metric_grades(names: dict[str, Any]) -> None:
    assert METRICS["starts"] is names["starts"]
    assert METRICS["starts"](" red, mostly", "red")


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, megatron_vita; dir(megatron_vita); print(*sys.modules, sep='\\n')"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment_with(), capture_output=True, text=True
    )
    loaded = set(ran.stdout.split())
    assert "megatron_vita" in loaded, ran.stderr
    assert not {name for name in loaded if name.startswith("megatron_vita.")}
    assert not loaded & {"torch", "numpy", "megatron", "typer", "yaml"}


def test_every_public_name_is_there() -> None:
    for name in megatron_vita.__all__:
        assert getattr(megatron_vita, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        megatron_vita.trian
