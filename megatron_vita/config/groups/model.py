"""Shapes of vision tower, projector and language model; the defaults are Long-VITA-14B's."""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.groups.output import OutputConfig
from megatron_vita.config.groups.rotary import RopeScalingConfig
from megatron_vita.config.parsing.fields import check_fields, described, require
from megatron_vita.rounding import ceil_div

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer; the defaults are InternViT-300M-448px.

    Other towers set these fields:

    InternViT-6B: normalization RMSNorm, qk_layernorm true, add_qkv_bias false.
    CLIP: layer_scale false, patch_bias false, pre_norm true, activation quick_gelu.
    SigLIP: layer_scale false, class_token false, post_norm true, activation gelu_tanh; at 384
    pixels ragged_grid true. EVA2-CLIP: layer_scale false, norm_after true.
    """

    kind: str = described("vit", "Module of the tower: vit, or one that a plugin registers.")
    image_size: int = described(448, "Side of a tile in pixels.", ge=1)
    patch_size: int = described(14, "Side of a patch in pixels.", ge=1)
    ragged_grid: bool = described(
        False,
        "Drop pixels beyond the last whole patch and pad an odd patch grid with zeros before the "
        "pixel shuffle.",
    )
    num_layers: int = described(24, "Transformer layers.", ge=1)
    hidden_size: int = described(1024, "Hidden size.", ge=1)
    ffn_hidden_size: int = described(4096, "Hidden size of the MLP.", ge=1)
    num_attention_heads: int = described(16, "Attention heads.", ge=1)
    normalization: Literal["LayerNorm", "RMSNorm"] = described("LayerNorm", "Normalization layers.")
    layernorm_epsilon: float = described(1e-6, "Epsilon of the normalization layers.", gt=0)
    qk_layernorm: bool = described(False, "RMSNorm on queries and keys, over all heads together.")
    add_qkv_bias: bool = described(True, "Biases on query, key and value.")
    activation: Activation = described("gelu", "Activation of the MLP; gelu is exact.")
    class_token: bool = described(True, "Prepend a class token, which is dropped from the output.")
    patch_bias: bool = described(True, "Bias on the patch embedding.")
    pre_norm: bool = described(False, "Normalize the embeddings before the first layer.")
    post_norm: bool = described(False, "Normalize the output of the last layer.")
    norm_after: bool = described(
        False, "Normalize the outputs of attention and MLP instead of their inputs."
    )
    layer_scale: bool = described(True, "LayerScale: a learned vector on each residual branch.")
    layer_scale_init: float = described(
        0.1, "Initial value of the LayerScale vectors of a tower trained from scratch."
    )
    init_method_std: float = described(0.02, "Standard deviation of initial weights.", ge=0)

    def __post_init__(self) -> None:
        check_fields(self, "model.vision.")
        # Dropping pixels silently would be a mistake for any tower that was not trained so.
        require(
            self.image_size % (2 * self.patch_size) == 0 or self.ragged_grid,
            f"model.vision.image_size {self.image_size} is not a multiple of twice patch_size "
            f"{self.patch_size}: the pixel shuffle joins patches two by two; set ragged_grid if "
            "the tower was trained with it",
        )
        require(
            self.image_size >= self.patch_size,
            f"model.vision.image_size {self.image_size} is smaller than patch_size "
            f"{self.patch_size}",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.vision.hidden_size {self.hidden_size} is not a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )

    @property
    def grid(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a tile, without the class token."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Tokens of a tile in the tower: patches, and the class token if there is one."""
        if self.class_token:
            return self.patches + 1
        return self.patches

    @property
    def image_token_length(self) -> int:
        """Placeholder tokens of a tile: its feature rows after the 2 x 2 pixel shuffle."""
        return ceil_div(self.grid, 2) ** 2


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """MLP that maps vision features to the hidden size of the language model."""

    kind: Literal["long_vita", "internvl"] = described(
        "long_vita",
        "long_vita (hidden layer of the vision tower's size, no biases) or internvl (of the "
        "language model's size, with biases).",
    )
    init_method_std: float = described(0.02, "Standard deviation of initial weights.", ge=0)

    def __post_init__(self) -> None:
        check_fields(self, "model.projector.")

    @property
    def has_bias(self) -> bool:
        """True if the linear layers have biases."""
        return self.kind == "internvl"


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A decoder of the Qwen2, Qwen3 or Llama family; the defaults are Qwen2.5-14B.

    Qwen3: qk_layernorm true, add_qkv_bias false. Llama: add_qkv_bias false.
    """

    num_layers: int = described(48, "Transformer layers.", ge=1)
    hidden_size: int = described(5120, "Hidden size.", ge=1)
    ffn_hidden_size: int = described(13824, "Hidden size of the SwiGLU MLP.", ge=1)
    num_attention_heads: int = described(40, "Query heads.", ge=1)
    num_query_groups: int = described(8, "Key and value heads (GQA groups).", ge=1)
    kv_channels: int = described(128, "Channels of a head.", ge=1, multiple_of=2)
    vocab_size: int = described(
        152064,
        "Rows of the embedding matrix, at least the size of the tokenizer's vocabulary.",
        ge=1,
    )
    layernorm_epsilon: float = described(1e-6, "Epsilon of RMSNorm.", gt=0)
    rotary_base: float = described(1e6, "Base of the rotary embedding.", gt=0)
    rope_scaling: RopeScalingConfig = described(
        RopeScalingConfig, "Scaling of the rotary embedding to longer contexts."
    )
    add_qkv_bias: bool = described(
        True, "Biases on query, key and value (Qwen2: true; Llama, Qwen3: false)."
    )
    qk_layernorm: bool = described(False, "RMSNorm on each query and key head (Qwen3: true).")
    untie_embeddings_and_output_weights: bool = described(
        True, "Give the output layer its own weights instead of the embedding's."
    )
    init_method_std: float = described(0.02, "Standard deviation of initial weights.", ge=0)

    def __post_init__(self) -> None:
        check_fields(self, "model.language.")
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.language.num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_query_groups {self.num_query_groups}",
        )

    def query_groups_of_rank(self, tensor_parallel_size: int) -> int:
        """Key and value heads of a TP rank: at least one, replicated if there are more ranks."""
        return max(self.num_query_groups // tensor_parallel_size, 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes of the parts of a model."""

    text_only: bool = described(
        False,
        "Build the language model alone, without vision tower and projector; no media in the data.",
    )
    vision: VisionConfig = described(VisionConfig, "Vision tower.")
    projector: ProjectorConfig = described(ProjectorConfig, "Projector.")
    language: LanguageConfig = described(LanguageConfig, "Language model.")
    output: OutputConfig = described(OutputConfig, "Output layer and loss.")

    @property
    def projector_hidden_size(self) -> int:
        """Hidden size of the projector: the language model's or the vision tower's, by its kind."""
        if self.projector.kind == "internvl":
            return self.language.hidden_size
        return self.vision.hidden_size
