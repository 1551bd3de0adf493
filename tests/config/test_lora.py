"""Linear maps that have adapters are chosen by names, Megatron's or Hugging Face's."""

import re

import pytest

from megatron_vita.config import Recipe, adapted_maps
from megatron_vita.errors import ConfigError

FROZEN = {
    "training.freeze_language_model": True,
    "training.freeze_vision_model": True,
    "training.freeze_projector": True,
}
LAYERS = 48  # of the default language model
TILES = 24  # layers of the default tower


def adapted(*targets: str, **changes: object) -> Recipe:
    lora = {"lora.rank": 4, "lora.targets": list(targets)}
    return Recipe().replaced(FROZEN | lora | changes)


def names(recipe: Recipe) -> list[str]:
    """Names of the pieces that have adapters."""
    return [
        each.linear.pieces[i].name
        for each in adapted_maps(recipe.model, recipe.lora)
        for i in each.chosen
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["linear_qkv"], ["q_proj", "k_proj", "v_proj"]),
        (["linear_proj"], ["o_proj"]),
        (["linear_fc1"], ["gate_proj", "up_proj"]),
        (["linear_fc2"], ["down_proj"]),
        (["language_model.*"], ["model.layers.*"]),
        (["self_attention.*"], ["self_attn.*"]),
    ],
)
def test_names_of_megatron_and_of_hugging_face_choose_the_same(
    ours: list[str], theirs: list[str]
) -> None:
    assert names(adapted(*ours)) == names(adapted(*theirs)) != []


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("q_proj", LAYERS),
        ("*", 7 * LAYERS + 6 * TILES + 2),
        ("layers.7.*.linear_fc2", 1),
        ("model.layers.7.mlp.*", 3),
        ("layers.3.mlp.*", 3 + 2),
        ("vision_model.*", 6 * TILES),
        ("vision_model.*.qkv", 3 * TILES),
        ("query", TILES),
        ("projector.*", 2),
        ("fc1", TILES + 1),
    ],
)
def test_a_pattern_is_matched_whole_or_from_a_dot_on(target: str, count: int) -> None:
    assert len(names(adapted(target))) == count


def test_some_pieces_of_a_joint_map_are_chosen() -> None:
    recipe = adapted("q_proj", "layers.0.self_attn.v_proj")
    maps = adapted_maps(recipe.model, recipe.lora)
    assert [each.chosen for each in maps] == [(0, 2)] + [(0,)] * (LAYERS - 1)


@pytest.mark.parametrize("target", ["qproj", "proj", "linear", "Q_PROJ", "layers.48.mlp.fc2", ""])
def test_a_pattern_that_matches_nothing_is_refused_by_name(target: str) -> None:
    wanted = re.escape(f"lora.targets: {target!r} matches no linear map of the model; known: qkv, ")
    with pytest.raises(ConfigError, match=wanted):
        adapted("q_proj", target)


def test_a_text_only_model_has_no_maps_of_a_tower() -> None:
    with pytest.raises(ConfigError, match="'qkv' matches no linear map"):
        adapted("qkv", **{"model.text_only": True})


@pytest.mark.parametrize("part", ["vision_model", "projector", "language_model"])
def test_parts_with_adapters_must_be_frozen(part: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"names maps of the {part}.*set training\.freeze_{part}"
    ):
        adapted(f"{part}.*", **{f"training.freeze_{part}": False})


@pytest.mark.parametrize(
    "change", [{"alpha": 3.0}, {"rslora": True}, {"targets": ["qkv"]}, {"lr": 1e-3}]
)
def test_fields_without_a_rank_are_refused(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=rf"lora\.{name} is .*, which needs lora\.rank"):
        Recipe().replaced({f"lora.{name}": change[name]})


def test_everything_may_be_frozen_beside_adapters_alone() -> None:
    assert adapted("q_proj").lora.scale == 32 / 4
    assert adapted("q_proj", **{"lora.rslora": True}).lora.scale == 32 / 2
    with pytest.raises(ConfigError, match="nothing is left to train"):
        Recipe().replaced(FROZEN)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora.targets": ["*"]}, "other parts than the language model"),
        (
            {"training.recompute_granularity": "full", "training.recompute_method": "uniform"},
            "recompute_method is uniform",
        ),
        (
            {
                "training.recompute_granularity": "selective",
                "training.recompute_modules": ["mlp"],
            },
            "mlp without training.mlp_chunk_tokens",
        ),
    ],
)
def test_dropout_is_refused_where_masks_cannot_be_drawn_again(
    changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.dropout is 0\.1.*{reason}"):
        adapted("q_proj", **{"lora.dropout": 0.1} | changes)


def test_norms_are_refused_beside_dropout_and_8_bit_weights() -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout is 0\.1, but must be 0 with lora\.dora"):
        adapted("q_proj", **{"lora.dora": True, "lora.dropout": 0.1})
    eight_bit = {"training.fp8_recipe": "tensorwise", "training.bf16": True}
    eight_bit |= {"parallel.attention_backend": "te"}
    with pytest.raises(
        ConfigError, match=r"lora\.dora is true, but training\.fp8_recipe is tensor"
    ):
        adapted("q_proj", **{"lora.dora": True} | eight_bit)


PACKED = {"lora.rank": 4, "lora.quantize_base": "nf4", **FROZEN}
QWEN_72B = {
    "model.language.hidden_size": 8192,
    "model.language.num_attention_heads": 64,
    "model.language.num_query_groups": 8,
    "model.language.ffn_hidden_size": 29568,
    "parallel.sequence_parallel": False,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"training.freeze_language_model": False, "lora.targets": ["projector.*"]},
            r"the language model is trained: set training\.freeze_language_model to true",
        ),
        ({"training.fp8_recipe": "blockwise"}, r"training\.fp8_recipe is blockwise"),
        ({"lora.dora": True}, r"lora\.dora is true"),
        ({"model.language.hidden_size": 5152}, r"hidden_size is 5152: .* multiple of .* 64"),
        ({"lora.quantize_block_size": 96}, "quantize_block_size is 96: it must be a power of two"),
        ({"lora.quantize_block_size": 16}, "quantize_block_size is 16: it must be from 32 to 4096"),
        ({"lora.quantize_base": "nf8"}, "quantize_base is 'nf8'; known: none, nf4"),
    ],
)
def test_4_bit_maps_are_refused_by_name_where_they_cannot_be(
    changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        Recipe().replaced(PACKED | changes)


@pytest.mark.parametrize(
    ("tp", "block_size", "fits"),
    [(1, 64, True), (2, 64, True), (4, 64, False), (4, 32, True), (8, 32, False)],
)
def test_blocks_of_4_bit_maps_must_end_where_a_ranks_part_of_a_row_ends(
    tp: int, block_size: int, fits: bool
) -> None:
    """Of 29568 columns, 8 ranks have 3696 each, which no block size divides."""
    changes = {
        "parallel.tensor_model_parallel_size": tp,
        "lora.quantize_block_size": block_size,
    }
    if fits:
        assert Recipe().replaced(PACKED | QWEN_72B | changes).lora.quantizes
        return
    with pytest.raises(ConfigError, match=rf"ffn_hidden_size over TP ranks is {29568 // tp}: lora"):
        Recipe().replaced(PACKED | QWEN_72B | changes)


@pytest.mark.parametrize("changes", [{"lora.quantize_block_size": 32}, {"lora.double_quant": True}])
def test_fields_of_4_bit_maps_need_them(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"needs lora\.quantize_base nf4; it is none"):
        Recipe().replaced({"lora.rank": 4, **FROZEN, **changes})
