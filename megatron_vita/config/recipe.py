"""Recipe: the configuration of a training stage, as one tree of dataclasses."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.config.groups.checkpoint import CheckpointConfig
from megatron_vita.config.groups.data import DataConfig
from megatron_vita.config.groups.dpo import DpoConfig
from megatron_vita.config.groups.generation import GenerationConfig
from megatron_vita.config.groups.lora import LoraConfig, Part, adapted_maps
from megatron_vita.config.groups.media import MediaConfig
from megatron_vita.config.groups.model import ModelConfig
from megatron_vita.config.groups.numerics import NumericsConfig
from megatron_vita.config.groups.optimizer import OptimizerConfig
from megatron_vita.config.groups.parallel import ParallelConfig
from megatron_vita.config.groups.text import TextConfig
from megatron_vita.config.groups.training import TrainingConfig
from megatron_vita.config.named_layouts import layout_changes
from megatron_vita.config.parsing.build import replaced
from megatron_vita.config.parsing.fields import described, require
from megatron_vita.config.recipe_checks import check_recipe, check_tensor_parallel
from megatron_vita.errors import ConfigError
from megatron_vita.rounding import ceil_div

FORMAT_VERSION = 1
FA4_WIDTHS = (64, 128)
"""Head sizes for which FlashAttention 4.0.0b36 is correct: at 80, gradients are wrong on Hopper."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Configuration of one training stage; the defaults train Long-VITA-14B. Groups are frozen:
    `replaced` makes changed copies."""

    format_version: int = described(FORMAT_VERSION, "Version of the recipe format.")
    model: ModelConfig = described(ModelConfig, "Shapes of the parts of the model.")
    text: TextConfig = described(TextConfig, "Tokenizer and prompt format.")
    media: MediaConfig = described(MediaConfig, "Preprocessing of images and videos.")
    generation: GenerationConfig = described(
        GenerationConfig, "Default sampling parameters of a server."
    )
    data: DataConfig = described(DataConfig, "Datasets and packing.")
    parallel: ParallelConfig = described(ParallelConfig, "Parallel layout.")
    optimizer: OptimizerConfig = described(OptimizerConfig, "Optimizer and learning rate schedule.")
    training: TrainingConfig = described(
        TrainingConfig, "Length of the run, frozen parts, recomputation, validation, logging."
    )
    numerics: NumericsConfig = described(
        NumericsConfig, "Rules for NaN, infinities and spikes of loss and gradient norm."
    )
    lora: LoraConfig = described(LoraConfig, "Low-rank adapters (LoRA) beside frozen parts.")
    dpo: DpoConfig = described(DpoConfig, "Preference loss (DPO) on pairs of answers.")
    checkpoint: CheckpointConfig = described(CheckpointConfig, "Saving and loading of checkpoints.")

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION,
            f"format_version is {self.format_version}; this version reads {FORMAT_VERSION}",
        )
        check_recipe(self)

    def replaced(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return a copy with fields replaced, checked as a whole: `{"training.bf16": True}`.

        Args:
            changes: values by dotted names; a value may be a group, as in {"text": TextConfig()}.
                "parallel.layout" stands for the fields of a layout, as in a recipe file.

        Raises:
            ConfigError: an unknown field, or values that are wrong, alone or together.
        """
        return replaced(self, layout_changes(self, changes) | dict(changes))

    def with_layout(self, parallel: ParallelConfig) -> "Recipe":
        """Return a copy with another parallel layout, to serve the model with.

        Raises:
            ConfigError: tensor parallelism does not divide the model's weight matrices.
        """
        served = copy.copy(self)
        # Not `replaced`: packs of training need not divide over the ranks that serve, nor layers
        # over pipeline stages that serving does not have.
        object.__setattr__(served, "parallel", parallel)
        check_tensor_parallel(served)
        return served

    def rows_of_rank(self, tokens: int) -> int:
        """Rows that a rank of a tensor-parallel group holds of `tokens`, rounded up."""
        if not self.parallel.sequence_parallel:
            return tokens
        return ceil_div(tokens, self.parallel.tensor_model_parallel_size)

    def fa4_obstacle(self) -> str:
        """Reason why attention_backend fa4 cannot be used, naming the field; empty: it can be."""
        width = self.model.language.kv_channels
        scheme = self.parallel.cp_comm_type
        if width not in FA4_WIDTHS:
            return (
                f"model.language.kv_channels is {width}: FlashAttention-4 is known to be right for "
                f"{' and '.join(map(str, FA4_WIDTHS))}; use parallel.attention_backend te"
            )
        if self.parallel.head_exchange_size > 1:
            return (
                f"parallel.cp_comm_type is {scheme}: fa4 gathers keys instead of exchanging "
                "heads; use all_gather, or parallel.attention_backend te"
            )
        return ""

    def is_frozen(self, part: Part) -> bool:
        """Tell whether nothing in a part is trained: neither its weights nor adapters."""
        adapted = any(a.linear.part == part for a in adapted_maps(self.model, self.lora))
        return getattr(self.training, f"freeze_{part}") and not adapted

    @property
    def schedule_iters(self) -> tuple[int, int]:
        """Last step of the learning rate's warm-up, and of its decay."""
        optimizer = self.optimizer
        share = int(optimizer.lr_warmup_fraction * self.training.train_iters)
        return (
            optimizer.lr_warmup_iters or share,
            optimizer.lr_decay_iters or self.training.train_iters,
        )

    def ranks_in_use(self, available: int) -> int:
        """Number of the `available` ranks that train: all, or with `parallel.elastic` the most that
        make whole replicas that divide the global batch.

        Raises:
            ConfigError: with `parallel.elastic`, they do not make one replica.
        """
        if not self.parallel.elastic:
            return available
        replica = self.parallel.replica_size
        for data_parallel in range(available // replica, 0, -1):
            try:
                self.data_parallel_size(data_parallel * replica)
            except ConfigError:
                continue
            return data_parallel * replica
        # Says what is wrong with the least.
        self.data_parallel_size(min(available, replica))
        raise AssertionError("unreachable")

    def data_parallel_size(self, world_size: int) -> int:
        """Number of data-parallel replicas in a world of `world_size` ranks.

        Raises:
            ConfigError: the ranks do not divide by those of a replica, or the global batch does not
                divide over replicas and, with interleaving, over pipeline stages.
        """
        replica = self.parallel.replica_size
        require(
            world_size % replica == 0,
            f"{world_size} ranks are not a multiple of {replica}, the ranks of one replica "
            f"(tensor {self.parallel.tensor_model_parallel_size} x pipeline "
            f"{self.parallel.pipeline_model_parallel_size} x context "
            f"{self.parallel.context_parallel_size})",
        )
        data_parallel = world_size // replica
        require(
            self.training.global_batch_size % data_parallel == 0,
            f"training.global_batch_size {self.training.global_batch_size} is not a multiple of "
            f"the {data_parallel} data-parallel replicas",
        )
        microbatches = self.training.global_batch_size // data_parallel
        # The interleaved schedule feeds micro-batches to the chunks in groups of one per stage.
        require(
            self.parallel.virtual_size is None
            or microbatches % self.parallel.pipeline_model_parallel_size == 0,
            f"training.global_batch_size {self.training.global_batch_size} gives {microbatches} "
            f"packs to each of {data_parallel} replicas; interleaved stages need a multiple of "
            f"pipeline_model_parallel_size {self.parallel.pipeline_model_parallel_size}",
        )
        return data_parallel
