"""Facts of published folders: every field of their config files, with its value.

Sizes of weights are left as published; `tiny` puts small ones in their place.
"""

import copy
import json
from pathlib import Path
from typing import Any

Fields = dict[str, Any]

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN2_5_05B_BASE = QWEN2_7B | {
    "eos_token_id": 151643, "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768,
    "tie_word_embeddings": True, "transformers_version": "4.40.1", "use_mrope": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128009, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
LLAMA3_1_8B = LLAMA3_8B | {
    "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
    "rope_scaling": LLAMA3_ROPE, "transformers_version": "4.42.3",
}  # fmt: skip
LLAMA3_2_1B = LLAMA3_1_8B | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}  # fmt: skip
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip

_INTERNVIT = {
    "architectures": ["InternVisionModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig",
                 "AutoModel": "modeling_intern_vit.InternVisionModel"},
    "drop_path_rate": 0.1, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1024, "image_size": 448,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b", "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "patch_size": 14, "qk_normalization": False, "qkv_bias": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.37.2", "use_flash_attn": True,
}  # fmt: skip
INTERNVIT_300M = _INTERNVIT
INTERNVIT_6B = _INTERNVIT | {
    "hidden_size": 3200, "intermediate_size": 12800, "norm_type": "rms_norm", "num_attention_heads": 25,
    "num_hidden_layers": 45, "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip
DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
INTERNVL3_1B_CHAT = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                 "AutoModel": "modeling_internvl_chat.InternVLChatModel",
                 "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel"},
    "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 448, "hidden_size": 896,
    "image_fold": None,
    "llm_config": {
        "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct", "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
        "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 70, "model_type": "qwen2", "moe_config": None, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": DYNAMIC,
        "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "use_bfloat16": True,
        "use_cache": False, "use_sliding_window": False, "vocab_size": 151674,
    },
    "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat", "output_attentions": False,
    "pad2square": False, "ps_version": "v2", "select_layer": -1, "system_message": None, "template": "internvl2_5",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": None, "use_backbone_lora": 0,
    "use_llm_lora": 0, "use_thumbnail": True,
    "vision_config": _INTERNVIT | {
        "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5", "capacity_factor": 1.2, "eval_capacity_factor": 1.4,
        "initializer_factor": 0.1, "initializer_range": 1e-10, "laux_allreduce": "all_nodes", "moe_coeff_ratio": 0.5,
        "moe_intermediate_size": 768, "moe_output_scale": 4.0, "noisy_gate_policy": "RSample_before",
        "num_experts": 8, "num_routed_experts": 4, "num_shared_experts": 4, "shared_expert_intermediate_size": 3072,
        "use_bfloat16": True, "use_flash_attn": False, "use_moe": False, "use_residual": True, "use_rts": False,
        "use_weighted_residual": False,
    },
}  # fmt: skip
_OLD_DUMP = {  # what transformers up to 4.45 wrote into the parts of a composed config
    "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": None,
    "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tie_word_embeddings": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torchscript": False, "typical_p": 1.0, "use_bfloat16": True,
}  # fmt: skip
INTERNVL2_5_1B_CHAT = {
    name: value for name, value in INTERNVL3_1B_CHAT.items()
    if name not in ("hidden_size", "image_fold", "system_message", "pad2square", "output_attentions")
} | {
    "_commit_hash": None,
    "llm_config": QWEN2_5_05B_BASE | _OLD_DUMP | {
        "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "attn_implementation": "flash_attention_2",
        "eos_token_id": 151645, "max_window_layers": 21, "vocab_size": 151674,
    },
    "vision_config": _INTERNVIT | {"drop_path_rate": 0.0, "output_attentions": False, "output_hidden_states": False,
                                   "return_dict": True, "use_bfloat16": True},
}  # fmt: skip
INTERNVL3_1B_HF = {
    "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 256,
    "image_token_id": 151667, "model_type": "internvl", "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": DYNAMIC, "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151674,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.53.0.dev0",
    "vision_config": {
        "architectures": ["InternVLVisionModel"], "attention_bias": True, "attention_dropout": 0.0,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024, "image_size": [448, 448],
        "initializer_factor": 0.1, "initializer_range": 1e-10, "intermediate_size": 4096, "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "layer_norm",
        "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": [14, 14],
        "projection_dropout": 0.0, "torch_dtype": "bfloat16", "use_absolute_position_embeddings": True,
        "use_mask_token": False, "use_mean_pooling": True, "use_qk_norm": False,
    },
    "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
}  # fmt: skip
CLIP_L_336 = {
    "_name_or_path": "openai/clip-vit-large-patch14-336", "architectures": ["CLIPModel"], "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 768,
    "text_config": _OLD_DUMP | {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
                                "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "vocab_size": 49408},
    "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                         "num_hidden_layers": 12, "projection_dim": 768},
    "torch_dtype": "float32", "transformers_version": None,
    "vision_config": _OLD_DUMP | {
        "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "transformers_version": "4.21.3",
    },
    "vision_config_dict": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                           "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
                           "projection_dim": 768},
}  # fmt: skip
SIGLIP_SO400M_384 = {
    "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
    "text_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_text_model",
                    "num_attention_heads": 16, "num_hidden_layers": 27},
    "torch_dtype": "float32", "transformers_version": "4.37.0.dev0",
    "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                      "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
                      "patch_size": 14},
}  # fmt: skip
SIGLIP_BASE_224 = SIGLIP_SO400M_384 | {  # whose sizes are the defaults of transformers' class
    "text_config": {"model_type": "siglip_text_model"},
    "vision_config": {"model_type": "siglip_vision_model"},
}  # fmt: skip
LONG_VITA_16K = QWEN2_7B | {
    "architectures": ["LongVITAForCausalLM"], "hidden_size": 5120, "intermediate_size": 13824,
    "max_window_layers": 70, "model_type": "long_vita", "num_attention_heads": 40, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "visual": _INTERNVIT,
    "auto_map": {"AutoModelForCausalLM": "modeling_long_vita.LongVITAForCausalLM"},
}  # fmt: skip

CONFIGS: dict[str, Fields] = {
    "qwen2-7b": QWEN2_7B, "qwen2.5-0.5b": QWEN2_5_05B_BASE, "qwen3-0.6b": QWEN3_06B, "llama3-8b": LLAMA3_8B,
    "llama3.1-8b": LLAMA3_1_8B, "llama3.2-1b": LLAMA3_2_1B, "smollm2-135m": SMOLLM2_135M,
    "internvit-300m": INTERNVIT_300M, "internvit-6b": INTERNVIT_6B, "internvl2.5-1b-chat": INTERNVL2_5_1B_CHAT,
    "internvl3-1b-chat": INTERNVL3_1B_CHAT, "internvl3-1b-hf": INTERNVL3_1B_HF, "clip-l-336": CLIP_L_336,
    "siglip-so400m-384": SIGLIP_SO400M_384, "siglip-base-224": SIGLIP_BASE_224, "long-vita-16k": LONG_VITA_16K,
}  # fmt: skip

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_FEATURES = {  # of OpenGVLab's folders
    "crop_size": 448, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 448,
} | _IMAGENET  # fmt: skip
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PREPROCESSORS: dict[str, Fields] = {
    "internvit-300m": _FEATURES, "internvit-6b": _FEATURES, "internvl2.5-1b-chat": _FEATURES,
    "internvl3-1b-chat": _FEATURES,
    "internvl3-1b-hf": {
        "crop_size": None, "crop_to_patches": False, "data_format": "channels_first", "default_to_square": True,
        "device": None, "do_center_crop": None, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
        "do_resize": True, "image_processor_type": "GotOcr2ImageProcessorFast", "input_data_format": None,
        "max_patches": 12, "min_patches": 1, "processor_class": "InternVLProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "return_tensors": None, "size": {"height": 448, "width": 448},
    } | _IMAGENET,
    "clip-l-336": {"crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
                   "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 336} | _CLIP,
    "siglip-so400m-384": {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_processor_type": "SiglipImageProcessor",
        "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"height": 384, "width": 384},
    } | _HALF,
}  # fmt: skip

PROCESSOR = {"image_seq_length": 256, "processor_class": "InternVLProcessor"}
"""processor_config.json of InternVL3 as transformers keeps it."""

GENERATION: dict[str, Fields] = {
    "qwen2-7b": {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
                 "pad_token_id": 151643, "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
                 "transformers_version": "4.37.0"},
    "qwen2.5-0.5b": {"bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048,
                     "transformers_version": "4.37.0"},
    "qwen3-0.6b": {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
                   "pad_token_id": 151643, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
                   "transformers_version": "4.51.0"},
    "llama3.1-8b": {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009],
                    "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.42.3"},
    "smollm2-135m": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
                     "transformers_version": "4.42.3"},
    "internvl3-1b-chat": {"_from_model_config": True, "eos_token_id": [151644, 151645, 151643],
                          "transformers_version": "4.37.2"},
}  # fmt: skip

_TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "projection_dim": 32,
}  # fmt: skip
TILE = 56


def tiny(name: str, **top: Any) -> Fields:
    """Shrink a published config to small sizes and tiles of 56 pixels; the number and kind of heads
    and patches stay. `top` replaces top-level fields."""
    return _shrunk(copy.deepcopy(CONFIGS[name])) | top


def _shrunk(fields: Fields) -> Fields:
    for field, value in fields.items():
        if isinstance(value, dict):
            fields[field] = _shrunk(value)
        elif field in _TINY:
            fields[field] = _TINY[field]
        elif field == "head_dim":
            fields[field] = 16
        elif field in ("image_size", "force_image_size"):
            fields[field] = [TILE, TILE] if isinstance(value, list) else TILE
        elif field == "image_seq_length":
            fields[field] = 4
    return fields


def tiny_preprocessor(name: str) -> Fields:
    """The published image processor with tiles of 56 pixels."""
    fields = copy.deepcopy(PREPROCESSORS[name])
    for field in ("size", "crop_size"):
        if isinstance(fields.get(field), dict):
            fields[field] = {"height": TILE, "width": TILE}
        elif fields.get(field) is not None:
            fields[field] = TILE
    return fields


def change(folder: Path, file: str = "config.json", **fields: Any) -> None:
    """Replace fields of a JSON file, or create it."""
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))
