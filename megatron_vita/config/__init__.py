"""Recipes: dataclasses documented field by field, read from YAML with dotted overrides.
They are frozen; `replaced` makes changed copies."""

from megatron_vita.config.build import replaced
from megatron_vita.config.callback import CallbackConfig
from megatron_vita.config.checkpoint import CheckpointConfig
from megatron_vita.config.data import DataConfig, DatasetConfig
from megatron_vita.config.dpo import DpoConfig
from megatron_vita.config.generation import GenerationConfig
from megatron_vita.config.help import describe_fields
from megatron_vita.config.load import load_recipe, recipe_from_dict
from megatron_vita.config.lora import (
    AdaptedMap,
    LinearMap,
    LoraConfig,
    adapted_maps,
    linear_maps,
)
from megatron_vita.config.media import MediaConfig
from megatron_vita.config.memory import LayerMemory, layer_memory
from megatron_vita.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vita.config.numerics import NumericsConfig
from megatron_vita.config.optimizer import OptimizerConfig
from megatron_vita.config.output import OutputConfig
from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.config.recipe import Recipe
from megatron_vita.config.rotary import RopeScalingConfig
from megatron_vita.config.text import TextConfig
from megatron_vita.config.training import TrainingConfig

__all__ = [
    "AdaptedMap",
    "CallbackConfig",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "DpoConfig",
    "GenerationConfig",
    "LanguageConfig",
    "LayerMemory",
    "LinearMap",
    "LoraConfig",
    "MediaConfig",
    "ModelConfig",
    "NumericsConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParallelConfig",
    "ProjectorConfig",
    "Recipe",
    "RopeScalingConfig",
    "TextConfig",
    "TrainingConfig",
    "VisionConfig",
    "adapted_maps",
    "describe_fields",
    "layer_memory",
    "linear_maps",
    "load_recipe",
    "recipe_from_dict",
    "replaced",
]
