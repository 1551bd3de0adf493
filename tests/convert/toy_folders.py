"""Tiny Hugging Face folders of each family, with random weights, as their libraries and authors
write them."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.model.hf_weights import randomize

VOCAB = 97
IMAGE_TOKEN = 90
ROWS = 4
TILE = 56
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": [TILE, TILE], "patch_size": [14, 14], "attention_bias": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
LARGE_VISION = VISION | {"attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def theta(base: float, **scaling: object) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base} | scaling}


def internvl(
    vision: dict, *, tied: bool = False, vocab_size: int = VOCAB, image_token_id: int = IMAGE_TOKEN
) -> InternVLForConditionalGeneration:
    shape = SHAPE | {"vocab_size": vocab_size}
    text = Qwen2Config(**shape, **theta(1e6), tie_word_embeddings=tied).to_dict()
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=image_token_id, image_seq_length=ROWS, downsample_ratio=0.5,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


LANGUAGE = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **theta(1e6), tie_word_embeddings=False)
    ),
    "qwen2-tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **theta(1e6), tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, **theta(1e6), head_dim=16, tie_word_embeddings=False)
    ),
    "llama-one-group": lambda: LlamaForCausalLM(
        LlamaConfig(**(SHAPE | {"num_key_value_heads": 1}), **theta(1e5), tie_word_embeddings=False)
    ),
    "llama-tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, **theta(1e5), tie_word_embeddings=True)
    ),
}
SCALED = {
    "llama-linear": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **theta(1e4, rope_type="linear", factor=4.0))),
    "llama-llama3": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            **theta(
                1e2, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        )
    ),
    "qwen2-yarn": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **theta(1e2, rope_type="yarn", factor=4.0, original_max_position_embeddings=16))
    ),
    "qwen3-yarn": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SHAPE,
            head_dim=16,
            **theta(
                1e2, rope_type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5,
                beta_fast=8.0, beta_slow=0.5,
            ),
        )
    ),
}  # fmt: skip
WHOLE = {
    "internvl-hf": lambda: internvl(VISION),
    "internvl-hf-tied": lambda: internvl(VISION, tied=True),
    "internvl-hf-large": lambda: internvl(LARGE_VISION),
}


def model_of(name: str) -> Any:
    model = (LANGUAGE | SCALED | WHOLE)[name]()
    randomize(model)
    return model


def save(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a folder as `save_pretrained` does, with a tokenizer and a generation config."""
    model.to(dtype).save_pretrained(folder)
    add_companions(folder, media=hasattr(model.config, "vision_config"))
    return folder


def add_companions(folder: Path, *, media: bool) -> None:
    words = {
        word: i
        for i, word in enumerate(["<unk>", "a", "b", " ", "\n", "<|im_start|>", "<|im_end|>"])
    }
    special = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"] if media else []
    kinds = ("context_image_token", "start_image_token", "end_image_token", "video_token")
    words |= {word: IMAGE_TOKEN + i for i, word in enumerate(special)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        **({"extra_special_tokens": dict(zip(kinds, special, strict=True))} if media else {}),
    )
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=6).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.25], "size": TILE})
    )


TOWER = VISION | {"image_size": TILE, "patch_size": 14}
TOWERS = {
    "internvit": lambda: InternVLVisionModel(InternVLVisionConfig(**VISION)),
    "internvit-large": lambda: InternVLVisionModel(InternVLVisionConfig(**LARGE_VISION)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)),
    "siglip-ragged": lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER | {"image_size": 50})),
}


def tower_of(name: str) -> Any:
    model = TOWERS[name]()
    randomize(model)
    return model


def save_vision(folder: Path, *, large: bool = False) -> Path:
    model = InternVLVisionModel(InternVLVisionConfig(**(LARGE_VISION if large else VISION)))
    randomize(model)
    model.save_pretrained(folder)
    return folder


def save_whole_clip(folder: Path) -> CLIPModel:
    """Write CLIP with its text tower, as most published folders hold it."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(**TOWER).to_dict(),
        text_config=CLIPTextConfig(**text, vocab_size=50).to_dict(),
    )
    model = CLIPModel(config)
    randomize(model)
    model.save_pretrained(folder)
    return model


def save_chat(
    model: InternVLForConditionalGeneration, folder: Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the same weights in OpenGVLab's format, with its tensor names and config fields."""
    folder.mkdir(parents=True)
    save_file(
        {name: t.to(dtype).contiguous() for name, t in chat_tensors(model).items()},
        folder / "model.safetensors",
    )
    vision = model.config.vision_config
    text = model.config.text_config.to_dict()
    config = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
        "ps_version": "v2", "select_layer": -1, "template": "internvl2_5", "max_dynamic_patch": 12,
        "force_image_size": TILE, "llm_config": text, "torch_dtype": "float32",
        "vision_config": vision_fields(vision) | {"model_type": "intern_vit_6b"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    add_companions(folder, media=True)
    return folder


def vision_fields(vision: InternVLVisionConfig) -> dict:
    return {
        "image_size": TILE, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "layer_norm_eps": 1e-6, "norm_type": vision.norm_type, "hidden_act": "gelu",
        "qk_normalization": vision.use_qk_norm, "qkv_bias": vision.attention_bias, "drop_path_rate": 0.0,
    }  # fmt: skip


def chat_tensors(
    model: InternVLForConditionalGeneration, *, projector: bool = True
) -> dict[str, Tensor]:
    """Tensors of OpenGVLab's format, perhaps without the projector."""
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    if not projector:
        state = {n: t for n, t in state.items() if not n.startswith("multi_modal_projector.")}
    chat = {}
    renamed = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "encoder.layer.": "encoder.layers.", "layernorm_before": "norm1", "layernorm_after": "norm2",
        "attention.projection_layer": "attn.proj", "attention.q_norm": "attn.q_norm", "attention.k_norm": "attn.k_norm",
        "lambda_1": "ls1", "lambda_2": "ls2",
    }  # fmt: skip
    for name, tensor in state.items():
        if name.startswith("vision_tower."):
            if ".q_proj." in name:
                qkv = [state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
                new = name.replace("attention.q_proj", "attn.qkv")
                tensor = torch.cat(qkv)
            elif "_proj." in name:
                continue
            else:
                new = name
            for theirs, original in renamed.items():
                new = new.replace(theirs, original)
            chat[new.replace("vision_tower.", "vision_model.")] = tensor
        elif name.startswith("multi_modal_projector."):
            part, kind = name.split(".")[1:]
            chat[f"mlp1.{ {'layer_norm': 0, 'linear_1': 1, 'linear_2': 3}[part] }.{kind}"] = tensor
        elif name.startswith("language_model."):
            chat[name.replace("language_model.", "language_model.model.")] = tensor
        else:
            chat[f"language_model.{name}"] = tensor
    return chat


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
