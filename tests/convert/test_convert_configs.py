"""Configs as published folders hold them give the shapes of our recipes."""

import json
from pathlib import Path

import pytest

from megatron_vita.config import LanguageConfig, RopeScalingConfig, VisionConfig, load_recipe
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.language_config import read_language, write_language
from megatron_vita.convert.families.vision_config import read_clip, read_internvit, read_siglip
from megatron_vita.errors import CheckpointError

MODELS = Path(__file__).parents[2] / "examples" / "long_vita" / "models"
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
SIZES = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
    "14b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip
INTERNVIT = {
    "model_type": "intern_vit_6b", "hidden_act": "gelu", "hidden_size": 1024, "image_size": 448,
    "intermediate_size": 4096, "layer_norm_eps": 1e-06, "norm_type": "layer_norm", "num_attention_heads": 16,
    "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "qk_normalization": False, "qkv_bias": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "max_position_embeddings": 131072,
}  # fmt: skip


def read(fields: dict) -> LanguageConfig:
    return read_language(Config(fields, "config.json"), tied=False)


@pytest.mark.parametrize("size", SIZES)
def test_qwen_and_internvit_are_the_shapes_of_the_long_vita_recipes(size: str) -> None:
    model = load_recipe(MODELS / f"{size}.yaml").model
    assert read(QWEN | SIZES[size]) == model.language
    read_vision = read_internvit(Config(INTERNVIT, "config.json"))
    assert read_vision == model.vision


def test_large_towers_are_read_as_published() -> None:
    large = INTERNVIT | {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45,
                         "num_attention_heads": 25, "norm_type": "rms_norm", "qk_normalization": True,
                         "qkv_bias": False}  # fmt: skip
    tower = read_internvit(Config(large, ""))
    assert (tower.normalization, tower.qk_layernorm, tower.add_qkv_bias) == ("RMSNorm", True, False)
    clip = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}  # fmt: skip
    assert read_clip(Config(clip, "")).image_token_length == 144
    siglip = {"model_type": "siglip", "vision_config": {"hidden_size": 1152, "intermediate_size": 4304,
              "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}}  # fmt: skip
    tower = read_siglip(Config(siglip, ""))
    assert (tower.patches, tower.image_token_length, tower.ragged_grid) == (729, 196, True)


def test_scaled_rotary_positions_are_read_from_either_generation_of_configs() -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = RopeScalingConfig(kind="llama3", factor=8.0, original_length=8192)
    assert read(LLAMA | {"rope_scaling": llama3 | {"rope_type": "llama3"}}).rope_scaling == expected
    new = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    new["rope_parameters"] = llama3 | {"rope_type": "llama3", "rope_theta": 500000.0}
    assert read(new).rope_scaling == expected
    assert read(new).rotary_base == 500000.0
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    scaled = read(QWEN | SIZES["7b"] | {"rope_scaling": yarn}).rope_scaling
    assert (scaled.kind, scaled.factor, scaled.original_length) == ("yarn", 4.0, 32768)
    assert scaled.attention_factor == pytest.approx(0.1 * 1.3862943611 + 1)
    deep = yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}
    assert read(
        QWEN | SIZES["7b"] | {"rope_scaling": deep}
    ).rope_scaling.attention_factor == pytest.approx(1.0)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "attention_factor": 1.25},
    ],
)  # fmt: skip
def test_what_is_written_is_read_again_the_same_in_either_generation(scaling: dict | None) -> None:
    shape = read(LLAMA | {"rope_scaling": scaling})
    for base in ({}, {"model_type": "llama", "rope_theta": 1.0}):
        assert read(json.loads(json.dumps(write_language(shape, base)))) == shape


def test_missing_and_wrong_fields_are_said_with_their_place() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: has no field intermediate_size"):
        read({name: value for name, value in LLAMA.items() if name != "intermediate_size"})
    with pytest.raises(
        CheckpointError, match=r"config\.json: attention_bias is True; supported: False"
    ):
        read(LLAMA | {"attention_bias": True})
    with pytest.raises(CheckpointError, match=r"image_size is \[448, 224\]: only squares"):
        read_internvit(Config(INTERNVIT | {"image_size": [448, 224]}, "config.json"))


def test_both_options_of_two_families_have_no_layout() -> None:
    with pytest.raises(CheckpointError, match=r"qk_layernorm and add_qkv_bias"):
        write_language(LanguageConfig(qk_layernorm=True), {})
    assert VisionConfig().tokens == 1025
