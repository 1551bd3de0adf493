"""A recipe: everything that defines a stage's run, as one tree of dataclasses."""

from dataclasses import dataclass

from megatron_vita.config.checkpoint import CheckpointConfig
from megatron_vita.config.data import DataConfig
from megatron_vita.config.fields import described, require
from megatron_vita.config.media import MediaConfig
from megatron_vita.config.model import ModelConfig
from megatron_vita.config.optimizer import OptimizerConfig
from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.config.text import TextConfig
from megatron_vita.config.training import TrainingConfig

FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Recipe:
    """One stage's run."""

    format_version: int = described(FORMAT_VERSION, "Version of the recipe format.")
    model: ModelConfig = described(ModelConfig, "Shapes of the model's parts.")
    text: TextConfig = described(TextConfig, "Tokenizer and prompt format.")
    media: MediaConfig = described(MediaConfig, "Images and videos.")
    data: DataConfig = described(DataConfig, "Datasets and packing.")
    parallel: ParallelConfig = described(ParallelConfig, "Layout over ranks.")
    optimizer: OptimizerConfig = described(OptimizerConfig, "Optimizer and schedule.")
    training: TrainingConfig = described(TrainingConfig, "Length, freezing, validation, logging.")
    checkpoint: CheckpointConfig = described(CheckpointConfig, "Saving and loading.")

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION,
            f"format_version is {self.format_version}; this version reads {FORMAT_VERSION}",
        )
        self._check_tensor_parallel()
        self._check_pipeline()
        self._check_sequence()

    def _check_tensor_parallel(self) -> None:
        tp, language = self.parallel.tensor_model_parallel_size, self.model.language
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            value = getattr(language, name)
            require(
                value % tp == 0,
                f"model.language.{name} {value} is not a multiple of parallel.tensor_model_parallel_size {tp}",
            )

    def _check_pipeline(self) -> None:
        self.parallel.layers_of_stages(self.model.language.num_layers)

    def _check_sequence(self) -> None:
        tp, cp = self.parallel.tensor_model_parallel_size, self.parallel.context_parallel_size
        alignment, length = self.data.document_alignment, self.data.seq_length
        require(
            cp == 1 or alignment % (2 * cp) == 0,
            f"data.document_alignment {alignment} is not a multiple of {2 * cp}, twice "
            f"parallel.context_parallel_size {cp}: each document is split into that many chunks",
        )
        require(
            length % (tp * cp) == 0,
            f"data.seq_length {length} is not a multiple of {tp * cp}, tensor_model_parallel_size {tp} times "
            f"context_parallel_size {cp}",
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas in a world of `world_size` ranks; ConfigError if it or the global batch does not divide."""
        replica = self.parallel.replica_size
        require(
            world_size % replica == 0,
            f"{world_size} ranks are not a multiple of {replica}, the ranks of one replica "
            f"(tensor {self.parallel.tensor_model_parallel_size} x pipeline "
            f"{self.parallel.pipeline_model_parallel_size} x context {self.parallel.context_parallel_size})",
        )
        data_parallel = world_size // replica
        require(
            self.training.global_batch_size % data_parallel == 0,
            f"training.global_batch_size {self.training.global_batch_size} is not a multiple of the "
            f"{data_parallel} data-parallel replicas",
        )
        microbatches = self.training.global_batch_size // data_parallel
        require(
            self.parallel.virtual_size is None or microbatches % self.parallel.pipeline_model_parallel_size == 0,
            f"training.global_batch_size {self.training.global_batch_size} gives {microbatches} packs to each of "
            f"{data_parallel} replicas; interleaved stages need a multiple of pipeline_model_parallel_size "
            f"{self.parallel.pipeline_model_parallel_size}",
        )
        return data_parallel
