"""Parameter counts by part of the model."""

from dataclasses import dataclass

from megatron_vita.config import LanguageConfig, ModelConfig, Recipe, VisionConfig
from megatron_vita.costs.memory.adapters import stage_adapters, whole_adapters
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
    attention = inner * width + heads * width
    if language.add_qkv_bias:
        attention += inner
    norms = 2 * width
    if language.qk_layernorm:
        norms += 2 * language.kv_channels
    return LayerShape(split=attention + 3 * language.ffn_hidden_size * width, whole=norms)


def vision_tower(vision: VisionConfig) -> LayerShape:
    """Count the whole tower's parameters, without padding heads.

    A TP group divides `split` where the tower is split over it.
    """
    width = vision.hidden_size
    ffn = vision.ffn_hidden_size
    norm = width
    if vision.normalization == "LayerNorm":
        norm *= 2  # RMSNorm has no bias
    split = _tower_attention(vision, width) + 2 * ffn * width + ffn
    whole = 2 * norm + 2 * width  # with the biases after the sums over TP
    if vision.layer_scale:
        whole += 2 * width
    embeddings = 3 * vision.patch_size**2 * width + vision.tokens * width
    for has, count in (
        (vision.patch_bias, width),
        (vision.class_token, width),
        (vision.pre_norm, norm),
        (vision.post_norm, norm),
    ):
        if has:
            embeddings += count
    return LayerShape(split=vision.num_layers * split, whole=vision.num_layers * whole + embeddings)


def _tower_attention(vision: VisionConfig, inner: int) -> int:
    """Count a tower layer's attention parameters, for heads of `inner` channels in all."""
    count = 4 * vision.hidden_size * inner
    if vision.add_qkv_bias:
        count += 3 * inner
    if vision.qk_layernorm:
        count += 2 * inner
    return count


def projector(model: ModelConfig) -> int:
    """Count the projector's parameters, all on every rank of the first stage."""
    joined = 4 * model.vision.hidden_size
    wide = model.language.hidden_size
    hidden = model.projector_hidden_size
    weights = joined * hidden + hidden * wide
    if model.projector.has_bias:
        weights += hidden + wide
    return 2 * joined + weights


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
    adapters: int = 0  # of all parts

    @property
    def language(self) -> int:
        """Parameters of the language model."""
        return self.embedding + self.layers + self.output

    @property
    def total(self) -> int:
        """Parameters of all parts."""
        return self.vision + self.projector + self.language + self.adapters

    def trainable(self, recipe: Recipe) -> int:
        """Count the parameters that the recipe does not freeze."""
        training = recipe.training
        count = self.adapters
        if not training.freeze_vision_model:
            count += self.vision
        if not training.freeze_projector:
            count += self.projector
        if not training.freeze_language_model:
            count += self.language
        return count


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
    vocabulary = ceil_div(model.language.vocab_size, tp) * model.language.hidden_size
    tied = not model.language.untie_embeddings_and_output_weights
    parts = {
        "layers": layers * (layer.split // tp + layer.whole),
        "adapters": stage_adapters(recipe, stage),
    }
    if first and not model.text_only:
        parts["vision"] = _vision(recipe)
        parts["projector"] = projector(model)
    if first:
        parts["embedding"] = vocabulary
    if last:
        parts["layers"] += model.language.hidden_size  # the final norm
        # Tied weights are one tensor on a single stage, and two copies on different ones.
        if not (first and tied):
            parts["output"] = vocabulary
    return StageParameters(**parts)


def _vision(recipe: Recipe) -> int:
    """Count the tower's parameters on one rank; a split tower has padding heads."""
    vision = recipe.model.vision
    tp = recipe.parallel.tensor_model_parallel_size
    tower = vision_tower(vision)
    if not recipe.parallel.vision_tensor_parallel:
        return tower.split + tower.whole
    width = vision.hidden_size
    heads = vision.num_attention_heads
    attention = _tower_attention(vision, ceil_div(heads, tp) * (width // heads))
    mlp = (2 * width + 1) * vision.ffn_hidden_size // tp
    return vision.num_layers * (attention + mlp) + tower.whole


def model_parameters(model: ModelConfig) -> int:
    """Count the whole model's parameters, each once."""
    return _whole_parts(model).total


def trained_parameters(recipe: Recipe) -> int:
    """Count the whole model's trained parameters, each once."""
    weights = _whole_parts(recipe.model).trainable(recipe)
    return weights + whole_adapters(recipe)


def _whole_parts(model: ModelConfig) -> StageParameters:
    """Count the parts of the whole model, as on one rank of one stage."""
    layer = language_layer(model.language)
    tower = vision_tower(model.vision)
    vocabulary = word_embedding(model.language)
    layers = model.language.num_layers * (layer.split + layer.whole) + model.language.hidden_size
    parts = {"embedding": vocabulary, "layers": layers}
    if not model.text_only:
        parts["vision"] = tower.split + tower.whole
        parts["projector"] = projector(model)
    if model.language.untie_embeddings_and_output_weights:
        parts["output"] = vocabulary
    return StageParameters(**parts)
