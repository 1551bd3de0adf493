"""Converted models give transformers' logits and gradients in fp32, on one process and at TP2, TP2
with SP, and PP2."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_vita import platform
from megatron_vita.checkpoint.store import find_checkpoint
from megatron_vita.convert.exporting import plan_export, read_ours
from megatron_vita.convert.families.mapping import TensorLocation
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.convert.importing import import_weights
from tests.convert.parity_worker import run_case
from tests.convert.toy_folders import (
    IMAGE_TOKEN,
    LANGUAGE,
    ROWS,
    SCALED,
    TILE,
    VOCAB,
    WHOLE,
    model_of,
    save,
    save_chat,
    tensors_of,
    tower_of,
)
from tests.functional.launch import torchrun
from tests.scale import scaled

HERE = Path(__file__).parent
LENGTH = 32
FAMILIES = [*LANGUAGE, *WHOLE, "internvl-chat"]
TP = {"tensor_model_parallel_size": 2}
LAYOUTS = {
    "tp2": TP,
    "tp2sp": TP | {"sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}
TOGETHER = LAYOUTS | {"tp2together": TP | {"vision_tensor_parallel": True}}
MIXED = ["clip", "siglip-ragged", "internvit-large"]
# Each family at a layout, each layout with tied and untied weights, with and without a tower.
FAMILY_PAIRS = scaled(
    [
        ("qwen2", "tp2"),
        ("qwen2-tied", "pp2"),
        ("qwen3", "tp2sp"),
        ("llama-one-group", "tp2sp"),
        ("llama-tied", "tp2"),
        ("internvl-hf", "tp2"),
        ("internvl-hf-tied", "pp2"),
        ("internvl-hf-large", "tp2sp"),
        ("internvl-chat", "pp2"),
    ],
    full=list(itertools.product(FAMILIES, LAYOUTS)),
)
MIXED_PAIRS = scaled(
    [
        ("clip", "tp2together"),
        ("clip", "pp2"),
        ("siglip-ragged", "tp2sp"),
        ("siglip-ragged", "tp2together"),
        ("internvit-large", "tp2"),
        ("internvit-large", "tp2together"),
    ],
    full=list(itertools.product(MIXED, TOGETHER)),
)


def their_model(family: str) -> nn.Module:
    return model_of(family.replace("chat", "hf")).eval()


def write(model: nn.Module, folder: Path, family: str) -> Path:
    if "chat" in family:
        return save_chat(model, folder)
    return save(model, folder)


def make_inputs(family: str, *, tile: int = TILE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text_only = family in LANGUAGE or family in SCALED
    placements = torch.tensor([] if text_only else [2, 7, 20]).long()
    ids = torch.randint(0, IMAGE_TOKEN, (LENGTH,), generator=generator)
    for start in placements.tolist():
        ids[start : start + ROWS] = IMAGE_TOKEN
    return {
        "ids": ids,
        "placements": placements,
        "tiles": torch.randn(len(placements), 3, tile, tile, generator=generator),
        "target": torch.randn(LENGTH, VOCAB, generator=generator),
    }


def expect(model: nn.Module, inputs: dict[str, Tensor], folder: Path, family: str) -> None:
    """Save transformers' logits, and its gradients written as weights are."""
    tiles = {"pixel_values": inputs["tiles"]} if len(inputs["tiles"]) else {}
    logits = model(input_ids=inputs["ids"][None], **tiles).logits[0]
    (logits * inputs["target"]).sum().backward()
    torch.save(logits.detach(), folder / "logits.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    write(model, folder / "gradients", family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family's checkpoint, its expected values, and the results of each layout."""
    folder = tmp_path_factory.mktemp("parity")
    platform.initialize_process()
    for family in [*FAMILIES, *SCALED]:
        model = their_model(family)
        case = folder / family
        import_weights([write(model, case / "theirs", family)], case / "ours", projector="internvl")
        inputs = make_inputs(family)
        torch.save(inputs, case / "inputs.pt")
        expect(model, inputs, case, family)
        run_case(case, "single", {})
    for name in MIXED:
        mix(name, folder / name, language=folder / "qwen2" / "theirs")
    pairs = json.dumps([*FAMILY_PAIRS, *MIXED_PAIRS])
    torchrun(HERE / "parity_worker.py", str(folder), pairs, json.dumps(TOGETHER), processes=2)
    return folder


def mix(name: str, case: Path, *, language: Path) -> None:
    """A tower, an initialized projector and a language model, with the results of one process."""
    tower_of(name).save_pretrained(case / "tower")
    import_weights([language, case / "tower"], case / "ours", projector="internvl")
    torch.save(make_inputs(name, tile=50 if "ragged" in name else TILE), case / "inputs.pt")
    run_case(case, "single", {})


@pytest.mark.parametrize(("name", "layout"), MIXED_PAIRS)
def test_parts_put_together_are_the_same_model_at_any_layout(
    folder: Path, name: str, layout: str
) -> None:
    case = folder / name
    expected, actual = (torch.load(case / path / "logits.pt") for path in ("single", layout))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    one, other = (DistSource(find_checkpoint(case / path)) for path in ("single", layout))
    vocabulary = ("word_embeddings.weight", "output_layer.weight")
    grads = {
        key: (one.read(TensorLocation(key)), other.read(TensorLocation(key))) for key in one.infos
    }
    total = torch.stack([grad.norm() for grad, _ in grads.values()]).norm()
    assert one.infos.keys() == other.infos.keys()
    for key, (grad, found) in grads.items():
        found = found[: len(grad)] if key.endswith(vocabulary) else found
        assert (found - grad).norm() <= 1e-5 * grad.norm() + 1e-7 * total, key


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "single") for family in FAMILIES),
        *FAMILY_PAIRS,
        *((family, "single") for family in SCALED),
    ],
)
def test_logits_and_gradients_are_those_of_transformers(
    folder: Path, family: str, layout: str
) -> None:
    case = folder / family
    expected, actual = (torch.load(path / "logits.pt") for path in (case, case / layout))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    theirs = tensors_of(case / "gradients")
    total = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    compared = set()
    source = DistSource(find_checkpoint(case / layout))
    for transfer in plan_export(case / "ours", folder_format="", like=None).transfers:
        for name, grad in transfer.split(read_ours(source, transfer)).items():
            apart = (grad - theirs[name]).norm()
            allowed = 1e-5 * theirs[name].norm() + 1e-8 * total
            assert apart <= allowed, f"{name}: {apart} > {allowed}"
            compared.add(name)
    assert compared == theirs.keys()
