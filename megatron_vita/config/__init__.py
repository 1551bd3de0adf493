"""Recipes: dataclasses documented field by field, read from YAML with dotted overrides.
They are frozen; `replaced` makes changed copies."""

from megatron_vita.config.groups.callback import CallbackConfig
from megatron_vita.config.groups.checkpoint import CheckpointConfig
from megatron_vita.config.groups.data import DataConfig, DatasetConfig
from megatron_vita.config.groups.dpo import DpoConfig
from megatron_vita.config.groups.generation import GenerationConfig
from megatron_vita.config.groups.lora import (
    AdaptedMap,
    LinearMap,
    LoraConfig,
    adapted_maps,
    linear_maps,
)
from megatron_vita.config.groups.media import MediaConfig
from megatron_vita.config.groups.model import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from megatron_vita.config.groups.numerics import NumericsConfig
from megatron_vita.config.groups.optimizer import OptimizerConfig
from megatron_vita.config.groups.output import OutputConfig
from megatron_vita.config.groups.parallel import ParallelConfig
from megatron_vita.config.groups.rotary import RopeScalingConfig
from megatron_vita.config.groups.text import TextConfig
from megatron_vita.config.groups.training import TrainingConfig
from megatron_vita.config.help import describe_fields
from megatron_vita.config.load import load_recipe, recipe_from_dict
from megatron_vita.config.memory import LayerMemory, layer_memory
from megatron_vita.config.parsing.build import replaced
from megatron_vita.config.recipe import FA4_WIDTHS, Recipe

__all__ = [
    "FA4_WIDTHS",
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
