"""Checkpoints of adapters hold what is trained alone, and resume at another layout on the same
base."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_vita import platform
from megatron_vita.checkpoint import base, store
from megatron_vita.config import Recipe
from megatron_vita.convert.adapters import AdapterCheckpoint, merge_adapters
from megatron_vita.convert.families.mapping import TensorLocation
from megatron_vita.convert.formats.torch_dist_reader import DistSource
from megatron_vita.errors import CheckpointError
from megatron_vita.model.nf4 import pack
from megatron_vita.model.quantized import quantized_linears
from megatron_vita.parallel import groups
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run, assemble_run
from megatron_vita.training.run.run_state import restore, save_run
from megatron_vita.training.step.step import train_step
from tests.functional.launch import run_ranks
from tests.functional.layout_worker import my_batches
from tests.functional.synthetic import WIDE, tiny_recipe

FIELDS = {
    "freeze_language_model": True,
    "freeze_vision_model": True,
    "rank": 3,
    "targets": ["q_proj", "v_proj", "mlp.*_proj", "vision_model.*.qkv"],
}
OTHER_LAYOUT = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "recompute_granularity": "full",
}


def recipe_in(folder: Path, **fields: object) -> Recipe:
    """A recipe that saves to `folder`, from the base beside it."""
    places = {
        "checkpoint.save": str(folder),
        "checkpoint.load": str(folder.parent / "base"),
        "text.tokenizer": "",
    }
    return tiny_recipe(**FIELDS, **fields).replaced(places)


def open_run(recipe: Recipe) -> Run:
    groups.initialize_groups(recipe.parallel)
    run = assemble_run(recipe)
    restore(run, ResumePoint.find(recipe))
    return run


def save_base(folder: Path, *, seed: int, **fields: object) -> None:
    """Write a whole model's initial weights as a checkpoint."""
    recipe = tiny_recipe(seed=seed, **fields)
    groups.initialize_groups(recipe.parallel)
    run = assemble_run(recipe)
    state = {"model": store.model_state(run.unwrapped_models)}
    manifest = {"recipe": dataclasses.asdict(recipe), "consumed_packs": 0}
    store.save_checkpoint(folder, step=0, state=state, manifest=manifest, keep=1)


def train(run: Run, steps: range) -> list[tuple[float, float]]:
    metrics = [train_step(run, iter(my_batches(run, step))) for step in steps]
    return [(m.loss, m.grad_norm) for m in metrics]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    """A checkpoint after two steps, and what the third one reports."""
    platform.initialize_process()
    folder = tmp_path_factory.mktemp("adapters") / "run"
    save_base(folder.parent / "base", seed=5)
    run = open_run(recipe_in(folder))
    train(run, range(2))
    save_run(run)
    return folder, train(run, range(2, 3))


def keys_in(checkpoint: Path) -> set[str]:
    return set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def test_a_checkpoint_holds_what_is_trained_alone(trained: tuple[Path, list]) -> None:
    checkpoint = store.find_checkpoint(trained[0])
    weights = {key for key in keys_in(checkpoint) if key.startswith(("language", "vision", "proj"))}
    assert {key for key in weights if not key.startswith("projector.")} == {
        key for key in weights if ".lora." in key
    }
    assert "projector.fc1.weight" in weights
    assert "vision_model.layers.1.attention.qkv.lora.b" in weights
    assert store.read_manifest(checkpoint)[base.BASE]["path"].endswith("/base")


def test_a_resumed_run_has_the_digits_of_an_uninterrupted_one(trained: tuple[Path, list]) -> None:
    folder, third = trained
    run = open_run(recipe_in(folder))
    assert run.step == 2
    assert train(run, range(2, 3)) == third


def resave(folder: Path, into: Path, **fields: object) -> None:
    """Resume at another layout and save at once."""
    run = open_run(recipe_in(folder, **OTHER_LAYOUT, **fields))
    run.recipe = run.recipe.replaced({"checkpoint.save": str(into)})
    save_run(run)


def tensors_in(run: Run) -> dict[str, torch.Tensor]:
    """Trained weights and Adam's moments of a run."""
    found: dict[str, torch.Tensor] = {}
    moments = run.optimizer.chained_optimizers[0].optimizer.state
    for number, values in enumerate(moments.values()):
        found |= {f"{number}.{name}": value for name, value in values.items()}
    weights = run.unwrapped_model.named_parameters()
    return found | {name: p.detach() for name, p in weights if p.requires_grad}


def test_another_layout_resumes_with_the_same_bits(trained: tuple[Path, list]) -> None:
    folder, _ = trained
    into = folder.parent / "resaved"
    run_ranks(resave, 2, folder, into)
    before = tensors_in(open_run(recipe_in(folder)))
    after = tensors_in(open_run(recipe_in(into)))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


QUANTIZED = WIDE | {"quantize_base": "nf4", "quantize_block_size": 32, "double_quant": True}


def test_adapters_of_a_4_bit_base_are_stamped_resumed_and_merged_by_its_own_weights(
    tmp_path: Path,
) -> None:
    platform.initialize_process()
    folder = tmp_path / "run"
    save_base(tmp_path / "base", seed=5, **WIDE)
    dense = open_run(recipe_in(folder, **WIDE))
    run = open_run(recipe_in(folder, **QUANTIZED))
    assert run.base_stamp == dense.base_stamp
    weights = dict(dense.unwrapped_model.named_parameters())
    for name, linear in quantized_linears(run.unwrapped_model):
        values = pack(weights[f"{name}.weight"].detach(), linear.packing).dense()
        assert linear.packed is not None
        assert torch.equal(linear.packed.dense(), values), name
    train(run, range(2))
    checkpoint = save_run(run)
    assert not any(key.endswith("linear_fc1.weight") for key in keys_in(checkpoint))
    third = train(run, range(2, 3))
    again = open_run(recipe_in(folder, **QUANTIZED))
    before = {name: value.clone() for name, value in tensors_in(again).items()}
    assert train(again, range(2, 3)) == third
    into = tmp_path / "resaved"
    run_ranks(resave, 2, folder, into, **QUANTIZED)
    after = tensors_in(open_run(recipe_in(into, **QUANTIZED)))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    with pytest.raises(CheckpointError, match=r"lora.quantize_base is none, but nf4 in the run"):
        open_run(recipe_in(folder, **WIDE))
    # Another run may start from its adapters with the base in its own type.
    continued = recipe_in(tmp_path / "next", **WIDE).replaced({"lora.load": str(folder)})
    assert open_run(continued).step == 0
    merge_adapters(folder, tmp_path / "merged")
    assert not store.recipe_of(tmp_path / "merged").lora.quantizes
    place = TensorLocation("language_model.decoder.layers.self_attention.linear_proj.weight", 1)
    found = [
        DistSource(store.find_checkpoint(tmp_path / name)).read(place)
        for name in ("merged", "base")
    ]
    assert torch.equal(*found)


def test_the_initial_weights_have_one_stamp_in_4_bits_and_not(tmp_path: Path) -> None:
    platform.initialize_process()
    stamps = []
    for fields in (WIDE, QUANTIZED):
        recipe = recipe_in(tmp_path / "run", **fields)
        stamps.append(open_run(recipe.replaced({"checkpoint.load": ""})).base_stamp)
    assert stamps[0] == stamps[1]


def test_adapters_of_another_base_are_refused(trained: tuple[Path, list]) -> None:
    folder, _ = trained
    other = folder.parent / "other"
    save_base(other, seed=6)
    changed = recipe_in(folder).replaced({"checkpoint.load": str(other)})
    with pytest.raises(CheckpointError, match=r"belong to another base: .*base, stamp .*other, st"):
        open_run(changed)
    fresh = recipe_in(folder).replaced({"checkpoint.load": ""})
    with pytest.raises(CheckpointError, match=r"initial weights of training\.seed"):
        open_run(fresh)


def test_adapters_alone_are_no_weights_to_start_from(trained: tuple[Path, list]) -> None:
    folder, _ = trained
    recipe = recipe_in(folder.parent / "next").replaced({"checkpoint.load": str(folder)})
    with pytest.raises(CheckpointError, match=r"holds adapters alone, of .*base; merge"):
        open_run(recipe)


@pytest.mark.parametrize("change", ["element", "swap"])
def test_the_stamp_tells_weights_apart(trained: tuple[Path, list], change: str) -> None:
    run = open_run(recipe_in(trained[0].parent / "fresh"))
    state = base.base_state(store.model_state(run.unwrapped_models))
    assert base.stamp_of(state) == run.base_stamp
    weight = run.unwrapped_model.language_model.decoder.layers[2].mlp.linear_fc2.weight.data
    if change == "element":
        weight[3, 4] += 1e-6
    else:
        weight[[0, 1]] = weight[[1, 0]]
    assert base.stamp_of(state) != run.base_stamp


DROPPED = {"rank": 3, "dropout": 0.4, "freeze_language_model": True}
KEPT = {"recompute_granularity": "full", "recompute_keep_attention_layers": -1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"recompute_granularity": "full"}),
        ({}, KEPT | {"activation_offload_fraction": 0.5}),
        (
            KEPT | {"mlp_chunk_tokens": 48},
            {"recompute_granularity": "full", "mlp_chunk_tokens": 48},
        ),
    ],
)
def test_recomputed_layers_drop_the_same_elements(first: dict, second: dict) -> None:
    platform.initialize_process()
    reports = []
    for levers in (first, second):
        recipe = tiny_recipe(**DROPPED, **levers)
        groups.initialize_groups(recipe.parallel)
        reports.append(train(assemble_run(recipe), range(2)))
    for before, after in zip(*reports, strict=True):
        assert after == pytest.approx(before, rel=1e-6)
    groups.initialize_groups(recipe.parallel)
    plain = train(assemble_run(recipe.replaced({"lora.dropout": 0.0})), range(2))
    # B is 0 at first, so that nothing is seen of A's input before the second step.
    assert plain[1][0] != pytest.approx(reports[0][1][0], rel=1e-5)


def test_masks_differ_by_pass_and_call_and_are_drawn_again() -> None:
    platform.initialize_process()
    recipe = tiny_recipe(**DROPPED)
    groups.initialize_groups(recipe.parallel)
    dropout = assemble_run(recipe).unwrapped_model.language_model.decoder.layers[0].dropouts[0]
    rows = torch.ones(1000, 8)

    def masks(number: int) -> list[torch.Tensor]:
        dropout.begin(number)
        return [dropout(rows), dropout(rows)]

    first, second = masks(1)
    assert first.mean() == pytest.approx(1.0, abs=0.05)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    again, other = masks(1), masks(2)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    for mask in (second, *other):
        assert not torch.equal(first, mask)


def test_a_new_run_starts_from_adapters_and_what_was_trained_beside(
    trained: tuple[Path, list],
) -> None:
    folder, _ = trained
    saved = open_run(recipe_in(folder))
    recipe = recipe_in(folder.parent / "continued").replaced({"lora.load": str(folder)})
    run = open_run(recipe)
    assert run.step == 0
    before = dict(saved.unwrapped_model.named_parameters())
    for name, parameter in run.unwrapped_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert before["projector.fc1.weight"].requires_grad


def test_a_whole_model_holds_no_adapters_to_start_from(trained: tuple[Path, list]) -> None:
    folder = trained[0]
    changes = {"lora.load": str(folder.parent / "base")}
    recipe = recipe_in(folder.parent / "continued").replaced(changes)
    with pytest.raises(CheckpointError, match="holds a whole model, no adapters"):
        open_run(recipe)


def test_the_base_is_recorded_by_a_place_that_holds_in_any_folder(
    trained: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = trained[0].parent
    monkeypatch.chdir(parent)
    recipe = recipe_in(trained[0])
    run = open_run(recipe)
    run.recipe = recipe.replaced(
        {"checkpoint.load": "base", "checkpoint.save": str(tmp_path / "run")}
    )
    saved = store.read_manifest(save_run(run))
    assert saved[base.BASE] == {"path": str(parent / "base"), "stamp": run.base_stamp}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora.rank": 4}, r"lora\.rank is 3 there and 4 in the recipe"),
        ({"lora.alpha": 5.0}, r"lora\.alpha is 32\.0 there and 5\.0 in the recipe"),
        ({"lora.dora": True}, r"lora\.dora is False there and True in the recipe"),
        ({"lora.targets": ["q_proj"]}, r"lora\.targets are .* other maps than \['q_proj'\]"),
    ],
)
def test_adapters_of_another_kind_are_no_start(
    trained: tuple[Path, list], change: dict, reason: str
) -> None:
    folder, _ = trained
    recipe = recipe_in(folder.parent / "continued").replaced({"lora.load": str(folder)})
    with pytest.raises(CheckpointError, match=reason):
        open_run(recipe.replaced(change))


def test_the_same_maps_by_other_names_are_the_same_adapters(trained: tuple[Path, list]) -> None:
    folder, _ = trained
    names = ["model.*.q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "vision_model.*.qkv"]
    changes = {"lora.load": str(folder), "lora.targets": names}
    assert open_run(recipe_in(folder.parent / "renamed").replaced(changes)).step == 0


def test_merging_takes_what_was_trained_beside_adapters_and_refuses_another_base(
    trained: tuple[Path, list], tmp_path: Path
) -> None:
    folder = trained[0]
    merge_adapters(folder, tmp_path / "merged")
    opened = AdapterCheckpoint.open(folder)
    place = TensorLocation("projector.fc1.weight")
    merged = DistSource(tmp_path / "merged").read(place)
    assert torch.equal(merged, opened.source.read(place))
    assert not torch.equal(
        merged, DistSource(store.find_checkpoint(opened.base["path"])).read(place)
    )
    recipe = store.recipe_of(tmp_path / "merged")
    assert (recipe.data.seq_length, recipe.text) == (
        opened.recipe.data.seq_length,
        opened.recipe.text,
    )
    save_base(tmp_path / "other", seed=6)
    with pytest.raises(CheckpointError, match=r"another base: .*/base, stamp .*/other/step"):
        merge_adapters(folder, tmp_path / "wrong", base=tmp_path / "other")


def test_adapters_beside_which_more_was_trained_than_is_now_are_refused(
    trained: tuple[Path, list], tmp_path: Path
) -> None:
    folder = trained[0]
    recipe = recipe_in(tmp_path / "next", freeze_projector=True)
    places = {"lora.load": str(folder), "checkpoint.load": str(folder.parent / "base")}
    with pytest.raises(
        CheckpointError, match=r"trained the projector too, but training.freeze_pro"
    ):
        open_run(recipe.replaced(places))


def test_rates_that_a_resumed_state_cannot_tell_apart_are_refused(
    trained: tuple[Path, list],
) -> None:
    recipe = recipe_in(trained[0]).replaced({"lora.lr": 0.5})
    with pytest.raises(CheckpointError, match=r"had one learning rate, .* would have"):
        open_run(recipe)
