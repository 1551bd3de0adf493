"""Parameter counts by part of the model."""

from dataclasses import dataclass

from megatron_vita.config import LanguageConfig, ModelConfig, Recipe, VisionConfig
from megatron_vita.rounding import ceil_div


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Parameter counts of a layer: those split over TP, and those replicated on each rank."""

    split: int
    whole: int


def language_layer(language: LanguageConfig) -> LayerShape:
    """Count a whole layer's parameters; divide `split` by TP for a rank.

    Biases of query, key and value and the norms are included.
    """
    width = language.hidden_size
    heads = language.num_attention_heads * language.kv_channels
    inner = heads + 2 * language.num_query_groups * language.kv_channels
    attention = inner * width + heads * width + (inner if language.add_qkv_bias else 0)
    norms = 2 * width + (2 * language.kv_channels if language.qk_layernorm else 0)
    return LayerShape(split=attention + 3 * language.ffn_hidden_size * width, whole=norms)


def vision_tower(vision: VisionConfig) -> LayerShape:
    """Count the whole tower's parameters, without padding heads.

    A TP group divides `split` where the tower is split over it.
    """
    width = vision.hidden_size
    ffn = vision.ffn_hidden_size
    norm = width * (2 if vision.normalization == "LayerNorm" else 1)
    scales = 2 * width if vision.layer_scale else 0
    split = 4 * width * width + 2 * ffn * width + ffn
    split += (3 * width if vision.add_qkv_bias else 0) + (2 * width if vision.qk_layernorm else 0)
    embeddings = 3 * vision.patch_size**2 * width + vision.tokens * width
    embeddings += width * (vision.patch_bias + vision.class_token) + norm * (
        vision.pre_norm + vision.post_norm
    )
    return LayerShape(
        split=vision.num_layers * split,
        whole=vision.num_layers * (2 * norm + scales + 2 * width) + embeddings,
    )


def projector(model: ModelConfig) -> int:
    """Count the projector's parameters, all on every rank of the first stage."""
    joined = 4 * model.vision.hidden_size
    wide = model.language.hidden_size
    biased = model.projector.kind == "internvl"
    hidden = wide if biased else model.vision.hidden_size
    return 2 * joined + joined * hidden + hidden * wide + (hidden + wide if biased else 0)


def word_embedding(language: LanguageConfig) -> int:
    """Count the parameters of the word embedding, or of an untied output layer.

    Rows that pad the vocabulary for TP are not counted.
    """
    return language.vocab_size * language.hidden_size


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Parameter counts on one rank of a pipeline stage, by part."""

    vision: int = 0
    projector: int = 0
    embedding: int = 0
    layers: int = 0
    output: int = 0

    @property
    def language(self) -> int:
        """Parameters of the language model."""
        return self.embedding + self.layers + self.output

    @property
    def total(self) -> int:
        """Parameters of all parts."""
        return self.vision + self.projector + self.language

    def trainable(self, recipe: Recipe) -> int:
        """Count the parameters that the recipe does not freeze."""
        training = recipe.training
        vision = 0 if training.freeze_vision_model else self.vision
        joint = 0 if training.freeze_projector else self.projector
        return vision + joint + (0 if training.freeze_language_model else self.language)


def stage_parameters(recipe: Recipe, stage: int) -> StageParameters:
    """Count the parameters on one rank of pipeline stage `stage`."""
    model = recipe.model
    parallel = recipe.parallel
    tp = parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    layer = language_layer(model.language)
    layers = parallel.layers_of_stages(model.language.num_layers)[stage]
    first = stage == 0
    last = stage == stages - 1
    encodes = first and not model.text_only
    vocabulary = ceil_div(model.language.vocab_size, tp) * model.language.hidden_size
    tied = not model.language.untie_embeddings_and_output_weights
    return StageParameters(
        vision=_vision(recipe) if encodes else 0,
        projector=projector(model) if encodes else 0,
        embedding=vocabulary if first else 0,
        layers=layers * (layer.split // tp + layer.whole)
        + (model.language.hidden_size if last else 0),
        output=vocabulary if last and not (first and tied) else 0,
    )


def _vision(recipe: Recipe) -> int:
    """Count the tower's parameters on one rank; a split tower has padding heads."""
    vision = recipe.model.vision
    tp = recipe.parallel.tensor_model_parallel_size
    tower = vision_tower(vision)
    if not recipe.parallel.vision_tensor_parallel:
        return tower.split + tower.whole
    width = vision.hidden_size
    heads = vision.num_attention_heads
    mine = ceil_div(heads, tp) * (width // heads)
    attention = (
        4 * width * mine
        + (3 * mine if vision.add_qkv_bias else 0)
        + (2 * mine if vision.qk_layernorm else 0)
    )
    mlp = (2 * width + 1) * vision.ffn_hidden_size // tp
    return vision.num_layers * (attention + mlp) + tower.whole


def model_parameters(model: ModelConfig) -> int:
    """Count the whole model's parameters, each once."""
    return _whole_parts(model).total


def trained_parameters(recipe: Recipe) -> int:
    """Count the whole model's trained parameters, each once."""
    return _whole_parts(recipe.model).trainable(recipe)


def _whole_parts(model: ModelConfig) -> StageParameters:
    """Count the parts of the whole model, as on one rank of one stage."""
    layer = language_layer(model.language)
    tower = vision_tower(model.vision)
    vocabulary = word_embedding(model.language)
    layers = model.language.num_layers * (layer.split + layer.whole) + model.language.hidden_size
    return StageParameters(
        vision=0 if model.text_only else tower.split + tower.whole,
        projector=0 if model.text_only else projector(model),
        embedding=vocabulary,
        layers=layers,
        output=vocabulary if model.language.untie_embeddings_and_output_weights else 0,
    )
