"""Published folders come in as they are: every field is used, known to be without effect, or
refused by name."""

import copy
import dataclasses

import pytest
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipVisionConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_vita.config import LanguageConfig, ModelConfig, RopeScalingConfig
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.folder_formats import format_of
from megatron_vita.convert.families.language_config import read_language, write_language
from megatron_vita.errors import CheckpointError
from megatron_vita.model.rotary import inverse_frequencies
from tests.convert.published import (
    CONFIGS,
    INTERNVL3_1B_CHAT,
    INTERNVL3_1B_HF,
    LLAMA3_1_8B,
    QWEN2_7B,
    QWEN3_06B,
)

HEADS = {"lm_head.weight", "language_model.lm_head.weight"}


def read(fields: dict, *, where: str = "config.json") -> ModelConfig:
    """Read the model of a config; unknown fields are errors here."""
    config = Config(fields, where)
    model = format_of(config).read(config, HEADS)
    # what the pixel reader takes of OpenGVLab's layout, and the pixel and text readers test
    tiling = ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")
    config.disregard((*tiling, "pad2square"))
    config.refuse_unread()
    return model


def read_text(**fields: object) -> LanguageConfig:
    return read_language(Config(QWEN2_7B | fields, "config.json"), tied=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_field_is_used_or_known_to_change_nothing(name: str) -> None:
    read(copy.deepcopy(CONFIGS[name]))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Qwen2Config, {}),
        (Qwen3Config, {}),
        (LlamaConfig, {}),
        (InternVLVisionConfig, {"attention_bias": True}),
        (CLIPVisionConfig, {}),
        (SiglipVisionConfig, {}),
        (InternVLConfig, {}),
        (CLIPConfig, {}),
        (SiglipConfig, {}),
    ],
)
def test_every_field_that_transformers_writes_is_known(
    kind: type[PretrainedConfig], fields: dict
) -> None:
    written = kind(**fields).to_dict()
    read(written | {"image_seq_length": 256} if kind is InternVLConfig else written)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen3-0.6b", None),
        ("internvl3-1b-chat", "llm_config"),
        ("internvl3-1b-chat", "vision_config"),
        ("internvl3-1b-hf", "text_config"),
        ("siglip-so400m-384", "vision_config"),
        ("internvl3-1b-hf", None),
        ("long-vita-16k", "visual"),
    ],
)
def test_no_unknown_field_passes_silently(name: str, part: str | None) -> None:
    config = copy.deepcopy(CONFIGS[name])
    place = config[part] if part else config
    place["attn_logit_softcapping"] = None
    read(config)
    place["attn_logit_softcapping"] = 50.0
    with pytest.raises(CheckpointError, match=r"attn_logit_softcapping is 50\.0.*--ignore-field"):
        read(config)


@pytest.mark.parametrize(
    ("name", "part", "fields"),
    [
        ("qwen2-7b", None, {"quantization_config": {"quant_method": "awq", "bits": 4}}),
        ("qwen2-7b", None, {"use_sliding_window": True}),
        ("qwen2-7b", None, {"use_mrope": True}),
        ("qwen3-0.6b", None, {"attention_bias": True}),
        ("llama3.1-8b", None, {"mlp_bias": True}),
        ("llama3.1-8b", None, {"partial_rotary_factor": 0.5}),
        ("smollm2-135m", None, {"rope_interleaved": True}),
        ("internvl3-1b-chat", None, {"use_llm_lora": 16}),
        ("internvl3-1b-chat", None, {"use_backbone_lora": 16}),
        ("internvl3-1b-chat", None, {"select_layer": -4}),
        ("internvl3-1b-chat", None, {"ps_version": "v1"}),
        ("internvl3-1b-chat", None, {"downsample_ratio": 0.25}),
        ("internvl3-1b-chat", None, {"force_image_size": 224}),
        ("internvl3-1b-chat", "vision_config", {"use_moe": True}),
        ("internvl3-1b-chat", "vision_config", {"norm_type": "batch_norm"}),
        ("internvl3-1b-hf", None, {"vision_feature_layer": -2}),
        ("internvl3-1b-hf", "vision_config", {"use_mask_token": True}),
        ("clip-l-336", "vision_config", {"hidden_size": 512}),
    ],
)
def test_a_value_that_would_change_numbers_is_refused_by_its_field(
    name: str, part: str | None, fields: dict
) -> None:
    config = copy.deepcopy(CONFIGS[name])
    (config[part] if part else config).update(fields)
    (field,) = fields
    with pytest.raises(CheckpointError, match=f"config.json.*{field}"):
        read(config)


@pytest.mark.parametrize("fields", [INTERNVL3_1B_CHAT, INTERNVL3_1B_HF])
def test_dynamic_rotary_positions_are_plain_ones(fields: dict) -> None:
    part = "llm_config" if "llm_config" in fields else "text_config"
    shape = read(copy.deepcopy(fields)).language
    assert shape.rope_scaling == RopeScalingConfig()
    theirs = Qwen2Config(**fields[part])
    frequencies, factor = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=32768)
    assert factor == 1.0
    assert (inverse_frequencies(shape) / frequencies - 1).abs().max() < 1e-6


def test_a_config_whose_rotary_positions_stay_keeps_its_own_fields() -> None:
    shape = read_text(rope_scaling={"type": "dynamic", "factor": 2.0})
    grown = dataclasses.replace(shape, vocab_size=shape.vocab_size + 16)
    written = write_language(grown, QWEN2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert written["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    assert written["vocab_size"] == shape.vocab_size + 16


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (YARN, {"rope_type": "default", "rope_theta": 1e6}),
        (YARN, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}),
        (YARN | {"rope_theta": 1e4}, {"rope_theta": 1e6}),
        ({"rope_type": "yarn", "type": "linear", "factor": 4.0}, None),
    ],
)
def test_rotary_positions_that_contradict_each_other_are_refused(
    scaling: dict, parameters: dict | None
) -> None:
    """transformers takes rope_scaling and drops the base in rope_parameters."""
    with pytest.raises(CheckpointError, match=r"rope_scaling|type is 'linear'"):
        read_text(rope_scaling=scaling, rope_parameters=parameters)


def test_rotary_positions_that_are_said_twice_alike_come_in() -> None:
    twice = {name: value for name, value in QWEN2_7B.items() if name != "rope_theta"}
    yarn = YARN | {"rope_theta": 5e5}
    config = Config(twice | {"rope_scaling": yarn, "rope_parameters": dict(yarn)}, "config.json")
    shape = read_language(config, tied=False)
    assert (shape.rotary_base, shape.rope_scaling.kind) == (5e5, "yarn")
    config.refuse_unread()


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}},
        {"rope_theta": -1.0},
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 2.5},
        {"vocab_size": True},
        {"rms_norm_eps": "1e-6"},
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        {"rope_scaling": ["linear", 2.0]},
        {"tie_word_embeddings": "false"},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"max_position_embeddings": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    ],
)
def test_a_field_of_a_wrong_type_or_size_is_named(fields: dict) -> None:
    name = next(iter(fields))
    inner = fields[name] if isinstance(fields[name], dict) else {name: None}
    with pytest.raises(CheckpointError) as error:
        read_text(**fields)
    assert any(field in str(error.value) for field in (name, *inner))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("whole", [CLIPConfig, SiglipConfig])
def test_fields_that_transformers_left_out_of_a_whole_model_are_its_defaults(
    whole: type[PretrainedConfig],
) -> None:
    said = whole().to_dict()
    kept = {"model_type": said["vision_config"]["model_type"]}
    assert read(said | {"vision_config": kept}).vision == read(said).vision
    kept["num_hidden_layers"] = 27
    assert read(said | {"vision_config": kept}).vision.num_layers == 27


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LLAMA3_1_8B, 128), (QWEN3_06B, 128), (QWEN2_7B | {"head_dim": None}, 128)],
)
def test_the_width_of_a_head_is_said_or_follows_from_the_others(
    config: dict, expected: int
) -> None:
    assert read(copy.deepcopy(config)).language.kv_channels == expected
