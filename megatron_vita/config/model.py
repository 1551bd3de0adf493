"""Shapes of the vision tower, the projector and the language model. Defaults are
Long-VITA-14B's."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require
from megatron_vita.config.output import OutputConfig
from megatron_vita.config.rotary import RopeScalingConfig
from megatron_vita.rounding import ceil_div

PROJECTORS = ("long_vita", "internvl")
NORMS = ("LayerNorm", "RMSNorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


@dataclass(kw_only=True)
class VisionConfig:
    """A vision transformer. Defaults: InternViT-300M-448px. Others differ from it in these fields:

    InternViT-6B: normalization RMSNorm, qk_layernorm true, add_qkv_bias false.
    CLIP: layer_scale false, patch_bias false, pre_norm true, activation quick_gelu.
    SigLIP: layer_scale false, class_token false, post_norm true, activation gelu_tanh; at 384
    pixels ragged_grid true. EVA2-CLIP: layer_scale false, norm_after true.
    """

    image_size: int = described(448, "Side of a tile in pixels.")
    patch_size: int = described(14, "Side of a patch in pixels.")
    ragged_grid: bool = described(
        False,
        "Pixels beyond the last whole patch are left out, and an odd grid is padded with zeros before joining.",
    )
    num_layers: int = described(24, "Transformer layers.")
    hidden_size: int = described(1024, "Width.")
    ffn_hidden_size: int = described(4096, "Width of the MLP.")
    num_attention_heads: int = described(16, "Attention heads.")
    normalization: str = described("LayerNorm", "LayerNorm or RMSNorm.")
    layernorm_epsilon: float = described(1e-6, "Epsilon of the norms.")
    qk_layernorm: bool = described(False, "RMSNorm of queries and keys over all heads together.")
    add_qkv_bias: bool = described(True, "Biases on query, key and value.")
    activation: str = described("gelu", "Of the MLP: gelu (exact), gelu_tanh or quick_gelu.")
    class_token: bool = described(
        True, "A token before the patches, which takes part and is dropped at the end."
    )
    patch_bias: bool = described(True, "Bias on the patch embedding.")
    pre_norm: bool = described(False, "A norm of the embeddings before the first layer.")
    post_norm: bool = described(False, "A norm after the last layer.")
    norm_after: bool = described(
        False, "Norms of a layer follow attention and MLP, inside the residual branch."
    )
    layer_scale: bool = described(True, "LayerScale: a learned vector on each residual branch.")
    layer_scale_init: float = described(
        0.1, "First value of the LayerScale vectors of a tower trained from scratch."
    )
    init_method_std: float = described(0.02, "Standard deviation of first weights.")

    def __post_init__(self) -> None:
        require(
            self.image_size % (2 * self.patch_size) == 0 or self.ragged_grid,
            f"model.vision.image_size {self.image_size} is not a multiple of twice patch_size {self.patch_size}: "
            "the pixel shuffle joins patches two by two; set ragged_grid for a tower that was trained so",
        )
        require(
            self.image_size >= self.patch_size,
            f"model.vision.image_size {self.image_size} is smaller than patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.vision.hidden_size {self.hidden_size} is not a multiple of "
            f"num_attention_heads {self.num_attention_heads}",
        )
        require(
            self.normalization in NORMS,
            f"model.vision.normalization is {self.normalization!r}; known: {', '.join(NORMS)}",
        )
        require(
            self.activation in ACTIVATIONS,
            f"model.vision.activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}",
        )

    @property
    def grid(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a tile, the class token not counted."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Rows that the tower's layers work on."""
        return self.patches + (1 if self.class_token else 0)

    @property
    def image_token_length(self) -> int:
        """Feature rows of a tile after the pixel shuffle, which joins patches two by two:
        placeholders."""
        return ceil_div(self.grid, 2) ** 2


@dataclass(kw_only=True)
class ProjectorConfig:
    """From vision features to the language model's width."""

    kind: str = described(
        "long_vita",
        "long_vita (hidden layer of vision width, no biases) or internvl (of LLM width, biased).",
    )
    init_method_std: float = described(0.02, "Standard deviation of first weights.")

    def __post_init__(self) -> None:
        require(
            self.kind in PROJECTORS,
            f"model.projector.kind is {self.kind!r}; known: {', '.join(PROJECTORS)}",
        )


@dataclass(kw_only=True)
class LanguageConfig:
    """A Qwen2-, Qwen3- (qk_layernorm) or Llama-shaped decoder (both: add_qkv_bias false). Defaults:
    Qwen2.5-14B."""

    num_layers: int = described(48, "Transformer layers.")
    hidden_size: int = described(5120, "Width.")
    ffn_hidden_size: int = described(13824, "Width of the SwiGLU MLP.")
    num_attention_heads: int = described(40, "Query heads.")
    num_query_groups: int = described(8, "Key and value heads.")
    kv_channels: int = described(128, "Width of a head.")
    vocab_size: int = described(
        152064, "Rows of the embedding matrix: at least the tokenizer's entries."
    )
    layernorm_epsilon: float = described(1e-6, "Epsilon of RMSNorm.")
    rotary_base: float = described(1e6, "Base of the rotary positions.")
    rope_scaling: RopeScalingConfig = described(
        RopeScalingConfig, "Rotary positions beyond the trained length."
    )
    add_qkv_bias: bool = described(
        True, "Biases on query, key and value: Qwen2 has them, Llama and Qwen3 have not."
    )
    qk_layernorm: bool = described(False, "RMSNorm of each query and key head: Qwen3 has it.")
    untie_embeddings_and_output_weights: bool = described(
        True, "Whether the output layer has weights of its own."
    )
    init_method_std: float = described(0.02, "Standard deviation of first weights.")

    def __post_init__(self) -> None:
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.language.num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_query_groups {self.num_query_groups}",
        )
        require(
            self.kv_channels % 2 == 0,
            f"model.language.kv_channels is {self.kv_channels}: rotary positions need an even number",
        )

    def query_groups_of_rank(self, tensor_parallel_size: int) -> int:
        """Key and value heads that a TP rank attends with; ranks beyond their number share one."""
        return max(self.num_query_groups // tensor_parallel_size, 1)


@dataclass(kw_only=True)
class ModelConfig:
    """The whole model."""

    text_only: bool = described(
        False, "Only the language model: no vision tower, no projector, no media in the data."
    )
    vision: VisionConfig = described(VisionConfig, "Vision tower.")
    projector: ProjectorConfig = described(ProjectorConfig, "Projector.")
    language: LanguageConfig = described(LanguageConfig, "Language model.")
    output: OutputConfig = described(OutputConfig, "Output layer and loss.")
