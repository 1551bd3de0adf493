"""Adapters in PEFT's folder form and merged into their base give PEFT's logits, in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import AdaptedMap, Recipe
from megatron_vita.convert.adapters import AdapterCheckpoint, merge_adapters, write_adapters
from megatron_vita.convert.exporting import export_checkpoint
from megatron_vita.convert.importing import import_weights
from megatron_vita.convert.peft import export_adapters, import_adapters
from megatron_vita.errors import CheckpointError
from megatron_vita.layout.slicing import slice_pack
from megatron_vita.model.build import build_model
from megatron_vita.model.lora import row_owners
from megatron_vita.parallel import groups
from tests.convert.test_convert_parity import make_inputs
from tests.convert.toy_folders import model_of, save

FAMILIES = {
    "qwen2": ["linear_qkv", "gate_proj", "down_proj"],
    "internvl-hf": ["*"],
}
FROZEN = {
    f"training.freeze_{part}": True for part in ("vision_model", "projector", "language_model")
}
RANK = 3


class Case:
    """A base as a folder and as a checkpoint, and adapters on it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        self.family = family
        self.inputs = make_inputs(family)
        self.theirs = save(model_of(family).eval(), folder / "theirs")
        import_weights([self.theirs], folder / "base", projector="internvl")
        lora = {"lora.rank": RANK, "lora.alpha": 2.0, "lora.targets": FAMILIES[family]}
        self.recipe = store.recipe_of(folder / "base").replaced(lora | FROZEN)
        self.generator = torch.Generator().manual_seed(4)
        base = {"path": str(folder / "base"), "stamp": ""}
        write_adapters(folder / "adapters", self.recipe, base=base, matrices=self.draw)

    def draw(self, adapted: AdaptedMap) -> tuple[Tensor, Tensor]:
        """Random `a` and `b`, zero where the map has no adapter."""
        owners = row_owners(adapted.linear)
        a = torch.randn(len(adapted.chosen) * RANK, adapted.linear.inputs, generator=self.generator)
        b = torch.randn(*owners.shape, RANK, generator=self.generator)
        chosen = torch.isin(owners, torch.tensor(adapted.chosen))
        return a * 0.2, b * 0.2 * chosen[..., None]

    def base_model(self, folder: Path | None = None) -> nn.Module:
        """transformers' model, of the base or of another folder."""
        kind = AutoModelForCausalLM if self.family == "qwen2" else AutoModelForImageTextToText
        return kind.from_pretrained(folder or self.theirs, dtype=torch.float32).eval()

    @torch.no_grad()
    def their_logits(self, model: nn.Module) -> Tensor:
        tiles = self.inputs["tiles"]
        pixels = {"pixel_values": tiles} if len(tiles) else {}
        return model(input_ids=self.inputs["ids"][None], **pixels).logits[0]

    @torch.no_grad()
    def our_logits(self, recipe: Recipe, base: Path, adapters: Path | None = None) -> Tensor:
        model = build_model(Recipe(model=recipe.model, lora=recipe.lora, training=recipe.training))
        store.load_weights([model], base, with_adapters=False)
        if adapters is not None:
            store.load_adapters([model], adapters, saved=recipe)
        ids = self.inputs["ids"]
        placements = self.inputs["placements"]
        pack = slice_pack(
            ids,
            labels=ids.roll(-1),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            placements=placements,
            frames=torch.zeros(len(placements), dtype=torch.bool),
            rows_per_tile=recipe.model.vision.image_token_length,
            layout=groups.rank_layout(),
        )
        return model.eval()(self.inputs["tiles"], pack, wanted_rows=torch.arange(len(ids)))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    platform.initialize_process()
    made = Case(tmp_path_factory.mktemp(request.param), request.param)
    groups.initialize_groups(made.recipe.parallel)
    return made


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_peft_loads_the_folder_and_gives_our_logits(case: Case) -> None:
    count = export_adapters(case.folder / "adapters", case.folder / "peft")
    assert count == len(load_file(case.folder / "peft" / "adapter_model.safetensors")) // 2 > 0
    theirs = case.their_logits(PeftModel.from_pretrained(case.base_model(), case.folder / "peft"))
    ours = case.our_logits(case.recipe, case.folder / "base", case.folder / "adapters")
    assert_close(ours, theirs)
    without = case.our_logits(Recipe(model=case.recipe.model), case.folder / "base")
    assert (without - ours).abs().max() > 0.1


def test_merged_weights_give_the_logits_of_base_and_adapters(case: Case) -> None:
    merge_adapters(case.folder / "adapters", case.folder / "merged")
    plain = store.recipe_of(case.folder / "merged")
    assert not plain.lora.rank
    merged = case.our_logits(Recipe(model=plain.model), case.folder / "merged")
    unmerged = case.our_logits(case.recipe, case.folder / "base", case.folder / "adapters")
    assert_close(merged, unmerged)
    export_checkpoint(case.folder / "merged", case.folder / "merged-hf")
    assert_close(case.their_logits(case.base_model(case.folder / "merged-hf")), merged)


def test_a_round_trip_through_the_folder_changes_no_bit(case: Case, tmp_path: Path) -> None:
    export_adapters(case.folder / "adapters", tmp_path / "peft")
    import_adapters(tmp_path / "peft", tmp_path / "back", base=case.folder / "base")
    before = AdapterCheckpoint.open(case.folder / "adapters")
    after = AdapterCheckpoint.open(tmp_path / "back")
    assert after.adapted == before.adapted
    assert after.recipe.lora.scale == before.recipe.lora.scale
    for adapted in before.adapted:
        for expected, actual in zip(before.read(adapted), after.read(adapted), strict=True):
            assert torch.equal(actual, expected)


def peft_folder(case: Case, folder: Path, **fields: Any) -> PeftModel:
    """Adapters that PEFT itself made and saved."""
    wanted: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "up_proj"],
    } | fields
    model = get_peft_model(case.base_model(), LoraConfig(**wanted, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As training would leave them: at first they are the norms.
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_folder_that_peft_has_saved_gives_its_logits_here(
    case: Case, tmp_path: Path, fields: dict[str, Any]
) -> None:
    theirs = peft_folder(case, tmp_path / "peft", **fields)
    import_adapters(tmp_path / "peft", tmp_path / "ours", base=case.folder / "base")
    opened = AdapterCheckpoint.open(tmp_path / "ours")
    ours = case.our_logits(opened.recipe, case.folder / "base", tmp_path / "ours")
    assert_close(ours, case.their_logits(theirs))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("r", 0),
    ],
)
def test_adapters_of_another_kind_are_refused_by_the_field(
    case: Case, tmp_path: Path, field: str, value: object
) -> None:
    export_adapters(case.folder / "adapters", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {field} is "):
        import_adapters(tmp_path / "peft", tmp_path / "ours", base=case.folder / "base")
    assert not (tmp_path / "ours").exists()


def test_a_format_without_the_map_is_refused(case: Case, tmp_path: Path) -> None:
    wrong = {"qwen2": "internvit", "internvl-hf": "internvl-chat"}[case.family]
    reason = {"qwen2": "has no such map", "internvl-hf": "joins query, key and value"}[case.family]
    with pytest.raises(CheckpointError, match=f"format {wrong}: {reason}"):
        export_adapters(case.folder / "adapters", tmp_path / "peft", folder_format=wrong)


def test_a_whole_model_holds_no_adapters(case: Case, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a whole model, no adapters"):
        export_adapters(case.folder / "base", tmp_path / "peft")
    with pytest.raises(CheckpointError, match="holds adapters alone"):
        export_checkpoint(case.folder / "adapters", tmp_path / "hf")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": RANK + 1}, r"lora_A.weight is \[3, \d+\]; \[4, \d+\] is needed"),
        ({"use_bdlora": True}, "use_bdlora is True"),
    ],
)
def test_a_folder_of_other_adapters_than_ours_is_refused_by_field(
    case: Case, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    folder = tmp_path / "peft"
    export_adapters(case.folder / "adapters", folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(CheckpointError, match=told):
        import_adapters(folder, tmp_path / "back", base=case.folder / "base")
    assert not (tmp_path / "back").exists()


def test_norms_of_dora_go_out_as_they_came_in_and_into_merged_weights(
    case: Case, tmp_path: Path
) -> None:
    theirs = peft_folder(case, tmp_path / "peft", use_dora=True)
    import_adapters(tmp_path / "peft", tmp_path / "ours", base=case.folder / "base")
    export_adapters(tmp_path / "ours", tmp_path / "back")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back")
    )
    assert before.keys() == after.keys()
    assert sum(name.endswith("lora_magnitude_vector") for name in before) > 0
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=0, msg=name)
    merge_adapters(tmp_path / "ours", tmp_path / "merged")
    plain = Recipe(model=store.recipe_of(tmp_path / "merged").model)
    assert_close(case.our_logits(plain, tmp_path / "merged"), case.their_logits(theirs))


@pytest.mark.parametrize("left_out", ["lora_magnitude_vector", "lora_A.weight"])
def test_a_folder_of_dora_with_a_tensor_left_out_is_refused_by_name(
    case: Case, tmp_path: Path, left_out: str
) -> None:
    peft_folder(case, tmp_path / "peft", use_dora=True)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith(left_out))
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=gone.rpartition(".lora_")[0].replace(".", r"\.")):
        import_adapters(tmp_path / "peft", tmp_path / "ours", base=case.folder / "base")
