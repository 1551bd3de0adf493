"""GGUF files: weights dequantized to fp32, under Hugging Face's names.

Names and the row order of rotary weights follow llama.cpp's converter from Hugging Face.
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.language_config import FAMILIES
from megatron_vita.convert.formats.tensors import TensorInfo
from megatron_vita.errors import CheckpointError
from megatron_vita.text.hugging_face import transformers_tokenizer

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SCALING = "rope.scaling.type"


class GgufSource:
    """Tensors of a GGUF file, each dequantized when it is read."""

    def __init__(self, file: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: the file is damaged or holds an unsupported model.
        """
        self.file = file
        try:
            self._reader = gguf.GGUFReader(file)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{file}: is no whole GGUF file: {error}") from error
        self.config = self._read_config()
        self._stored = {_their_name(tensor.name, file): tensor for tensor in self._reader.tensors}
        self._infos = {
            name: TensorInfo(
                file=file, dtype=torch.float32, shape=tuple(reversed(tensor.shape.tolist()))
            )
            for name, tensor in self._stored.items()
        }

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """See TensorSource."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """Dequantize a tensor to fp32, in Hugging Face's order of rows."""
        stored = self._stored[name]
        # Copied, since an fp32 tensor is a read-only view of the memory map.
        values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy()).float()
        whole = values.view(self._infos[name].shape)
        # Rows of queries and keys are permuted by llama.cpp's converter, for Llama only.
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(
            name.split(".")[-2]
        )
        if heads is None or self.config.need("model_type") != "llama":
            return whole
        # llama.cpp turns neighbouring rows; Hugging Face turns a row of the first half with one of
        # the second.
        return whole.unflatten(0, (self.config.need(heads), -1, 2)).transpose(1, 2).flatten(0, 2)

    def release(self, name: str) -> None:
        """See TensorSource. Nothing is kept."""

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            return default
        return field.contents()

    def _read_config(self) -> Config:
        """Build the Hugging Face config of the model from the file's metadata."""
        family = self._field("general.architecture")
        if family not in FAMILIES:
            raise CheckpointError(
                f"{self.file}: general.architecture is {family!r}; supported: {', '.join(map(repr, FAMILIES))}"
            )
        if (scaling := self._field(f"{family}.{_SCALING}", "none")) != "none":
            raise CheckpointError(
                f"{self.file}: {family}.{_SCALING} is {scaling!r}; supported: 'none'"
            )
        heads = self._field(f"{family}.attention.head_count")
        width = self._field(f"{family}.embedding_length")
        fields = {
            "architectures": [FAMILIES[family].architecture],
            "model_type": family,
            "hidden_size": width,
            "intermediate_size": self._field(f"{family}.feed_forward_length"),
            "num_hidden_layers": self._field(f"{family}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field(f"{family}.attention.head_count_kv", heads),
            "head_dim": self._field(f"{family}.attention.key_length", width // heads),
            "vocab_size": len(self._field("tokenizer.ggml.tokens", [])),
            "max_position_embeddings": self._field(f"{family}.context_length"),
            # was fp32
            # Stored in fp32, 1e-6 reads as 9.99999997e-07.
            "rms_norm_eps": round(self._field(f"{family}.attention.layer_norm_rms_epsilon"), 12),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self._field(f"{family}.rope.freq_base", 1e4),
            },
            # The file has no such flag: a tied model stores no output layer.
            "tie_word_embeddings": all(
                tensor.name != "output.weight" for tensor in self._reader.tensors
            ),
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "dtype": "float32",
        }
        return Config(fields, str(self.file))


def _their_name(name: str, file: Path) -> str:
    """Translate llama.cpp's name of a tensor to Hugging Face's."""
    stem, _, kind = name.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and block.isdigit() and rest in _LAYER:
        return f"model.layers.{block}.{_LAYER[rest]}.{kind}"
    raise CheckpointError(f"{file}: has tensor {name}, which no model known here has")


def write_gguf_sidecar_files(file: Path, folder: Path) -> None:
    """Write the tokenizer and the chat template that a GGUF file holds."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = transformers_tokenizer(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever its many loaders raise
        raise CheckpointError(
            f"{file}: its tokenizer cannot be read: {type(error).__name__}: {error}"
        ) from error
    tokenizer.save_pretrained(folder)
