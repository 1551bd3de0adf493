"""Recipe: the configuration of a training stage, as one tree of dataclasses."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.config.build import replaced
from megatron_vita.config.checkpoint import CheckpointConfig
from megatron_vita.config.data import DataConfig
from megatron_vita.config.fields import described, require
from megatron_vita.config.generation import GenerationConfig
from megatron_vita.config.lora import LoraConfig, Part, adapted_maps
from megatron_vita.config.media import MediaConfig
from megatron_vita.config.model import ModelConfig
from megatron_vita.config.optimizer import OptimizerConfig
from megatron_vita.config.parallel import ParallelConfig
from megatron_vita.config.text import TextConfig
from megatron_vita.config.training import TrainingConfig
from megatron_vita.errors import ConfigError
from megatron_vita.rounding import ceil_div

FORMAT_VERSION = 1
FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 128}
"""Divisors of a matrix's rows and columns by `training.fp8_recipe`: units of the products, blocks."""
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
    lora: LoraConfig = described(LoraConfig, "Low-rank adapters (LoRA) beside frozen parts.")
    checkpoint: CheckpointConfig = described(CheckpointConfig, "Saving and loading of checkpoints.")

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION,
            f"format_version is {self.format_version}; this version reads {FORMAT_VERSION}",
        )
        # Tensor parallelism first: the checks of context parallelism divide heads by its size.
        self._check_tensor_parallel()
        self._check_context_parallel()
        self._check_backend()
        self._check_fp8()
        self._check_layers()
        self._check_sequence()
        self._check_parts()
        self._check_adapters()
        self._check_adapter_dropout()
        self._check_checkpoints()
        self._check_schedule()
        self._check_optimizer()

    def replaced(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return a copy with fields replaced, checked as a whole: `{"training.bf16": True}`.

        Args:
            changes: values by dotted names; a value may be a group, as in {"text": TextConfig()}.

        Raises:
            ConfigError: an unknown field, or values that are wrong, alone or together.
        """
        return replaced(self, changes)

    def with_layout(self, parallel: ParallelConfig) -> "Recipe":
        """Return a copy with another parallel layout, to serve the model with.

        Raises:
            ConfigError: tensor parallelism does not divide the model's weight matrices.
        """
        served = copy.copy(self)
        # Not `replaced`: packs of training need not divide over the ranks that serve, nor layers
        # over pipeline stages that serving does not have.
        object.__setattr__(served, "parallel", parallel)
        served._check_tensor_parallel()
        return served

    def _check_tensor_parallel(self) -> None:
        tp = self.parallel.tensor_model_parallel_size
        language = self.model.language
        for name in ("num_attention_heads", "ffn_hidden_size"):
            value = getattr(language, name)
            require(
                value % tp == 0,
                f"model.language.{name} {value} is not a multiple of "
                f"parallel.tensor_model_parallel_size {tp}",
            )
        shared = language.num_query_groups
        # With more TP ranks than key and value heads, megatron-core splits the projection's
        # rows over the ranks and gathers its outputs, which needs rows that divide.
        require(
            shared % tp == 0 or (tp % shared == 0 and 2 * shared * language.kv_channels % tp == 0),
            f"model.language.num_query_groups {shared} is neither a multiple nor a divisor of "
            f"parallel.tensor_model_parallel_size {tp}",
        )
        width = self.model.vision.ffn_hidden_size
        require(
            not self.parallel.vision_tensor_parallel or width % tp == 0,
            f"model.vision.ffn_hidden_size {width} is not a multiple of "
            f"parallel.tensor_model_parallel_size {tp}, which parallel.vision_tensor_parallel "
            "needs",
        )

    def _check_context_parallel(self) -> None:
        ranks = self.parallel.head_exchange_size
        tp = self.parallel.tensor_model_parallel_size
        if ranks == 1:
            return
        language = self.model.language
        of_rank = {
            "num_attention_heads": language.num_attention_heads // tp,
            "num_query_groups": language.query_groups_of_rank(tp),
        }
        for name, heads in of_rank.items():
            require(
                heads % ranks == 0,
                f"parallel.cp_comm_type {self.parallel.cp_comm_type} splits model.language.{name} "
                f"over {ranks} ranks, but a TP rank has {heads}; use p2p or all_gather, or a "
                "smaller tensor_model_parallel_size",
            )

    def _check_backend(self) -> None:
        name = self.parallel.attention_backend
        width = self.model.language.kv_channels
        if name not in ("te", "fa4"):
            return
        require(
            self.training.bf16,
            f"parallel.attention_backend {name} needs training.bf16: its kernels take no fp32; or "
            "use torch",
        )
        require(
            name == "fa4" or (width % 8 == 0 and width <= 128),
            f"model.language.kv_channels is {width}: Transformer Engine's fused attention takes "
            "multiples of 8 up to 128; or use parallel.attention_backend torch",
        )
        if name == "fa4":
            obstacle = self.fa4_obstacle()
            require(not obstacle, f"parallel.attention_backend is fa4, but {obstacle}")

    def _check_fp8(self) -> None:
        name = self.training.fp8_recipe
        if name == "none":
            return
        require(
            self.parallel.attention_backend != "torch",
            f"training.fp8_recipe is {name}, but parallel.attention_backend is torch: only te and "
            "fa4 have 8-bit linear layers",
        )
        multiple = FP8_MULTIPLES[name]
        for what, size in self._matrix_sizes().items():
            require(
                size % multiple == 0,
                f"{what} is {size}: training.fp8_recipe {name} needs a multiple of {multiple}",
            )
        rows = self.rows_of_rank(self.data.seq_length // self.parallel.context_parallel_size)
        piece = self.rows_of_rank(self.training.mlp_chunk_tokens)
        require(
            not piece or rows % piece == 0,
            f"training.mlp_chunk_tokens is {self.training.mlp_chunk_tokens}: training.fp8_recipe "
            f"{name} needs pieces of equal length",
        )

    def _matrix_sizes(self) -> dict[str, int]:
        """Rows and columns of one rank's matrices, by the fields that they follow from."""
        language = self.model.language
        parallel = self.parallel
        tp = parallel.tensor_model_parallel_size
        heads = language.num_attention_heads // tp
        joint = heads + 2 * language.query_groups_of_rank(tp)
        return {
            "data.seq_length over CP and SP ranks": self.rows_of_rank(
                self.data.seq_length // parallel.context_parallel_size
            ),
            "training.mlp_chunk_tokens over SP ranks": self.rows_of_rank(
                self.training.mlp_chunk_tokens
            ),
            "model.language.hidden_size": language.hidden_size,
            "model.language.ffn_hidden_size over TP ranks": language.ffn_hidden_size // tp,
            "model.language.num_attention_heads x kv_channels over TP ranks": heads
            * language.kv_channels,
            "the width of queries, keys and values over TP ranks": joint * language.kv_channels,
        }

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

    def _check_layers(self) -> None:
        """Check the layers of pipeline stages, and the numbers of recomputed layers."""
        # Recomputed layers are counted in each interleaved chunk, on the fullest stage.
        chunks = self.parallel.virtual_pipeline_model_parallel_size
        layers = max(self.parallel.layers_of_stages(self.model.language.num_layers)) // chunks
        number = self.training.recompute_num_layers
        require(
            number <= layers,
            f"training.recompute_num_layers is {number}, but no rank has more than {layers} "
            "layers at once",
        )
        kept = self.training.recompute_keep_attention_layers
        recomputed = number or layers
        require(
            kept <= recomputed,
            f"training.recompute_keep_attention_layers is {kept}, but no rank recomputes more "
            f"than {recomputed} layers at once; -1 keeps all",
        )

    def _check_sequence(self) -> None:
        tp = self.parallel.tensor_model_parallel_size
        cp = self.parallel.context_parallel_size
        length = self.data.seq_length
        # Zigzag cuts each attention segment into 2 x CP chunks: a document, or else the whole pack.
        segment = "pack"
        name = "seq_length"
        if self.data.isolate_documents:
            segment = "document"
            name = "document_alignment"
        chunked = getattr(self.data, name)
        require(
            cp == 1 or chunked % (2 * cp) == 0,
            f"data.{name} {chunked} is not a multiple of {2 * cp}, twice "
            f"parallel.context_parallel_size {cp}: each {segment} is split into that many chunks",
        )
        require(
            length % (tp * cp) == 0,
            f"data.seq_length {length} is not a multiple of {tp * cp}, tensor_model_parallel_size "
            f"{tp} times context_parallel_size {cp}",
        )

    def _check_parts(self) -> None:
        training = self.training
        frozen = {
            "vision model": training.freeze_vision_model or self.model.text_only,
            "projector": training.freeze_projector or self.model.text_only,
            "language model": training.freeze_language_model,
        }
        require(
            not all(frozen.values()) or self.lora.rank > 0,
            "training freezes the vision model, the projector and the language model, or "
            "model.text_only has none of the first two: nothing is left to train",
        )

    def _check_adapter_dropout(self) -> None:
        """Check that masks can be drawn again wherever layers are computed again."""
        if not self.lora.dropout:
            return
        training = self.training
        reason = ""
        if training.fit_memory:
            reason = "training.fit_memory does not count its masks"
        elif any(a.linear.part != "language_model" for a in adapted_maps(self.model, self.lora)):
            reason = "lora.targets names maps of other parts than the language model"
        elif training.recompute_granularity == "full" and training.recompute_method == "uniform":
            reason = "training.recompute_method is uniform; use block"
        elif (
            training.recompute_granularity == "selective"
            and "mlp" in training.recompute_modules
            and not training.mlp_chunk_tokens
        ):
            reason = "training.recompute_modules has mlp without training.mlp_chunk_tokens"
        require(not reason, f"lora.dropout is {self.lora.dropout}, but must be 0: {reason}")

    def is_frozen(self, part: Part) -> bool:
        """Tell whether nothing in a part is trained: neither its weights nor adapters."""
        adapted = any(a.linear.part == part for a in adapted_maps(self.model, self.lora))
        return getattr(self.training, f"freeze_{part}") and not adapted

    def _check_adapters(self) -> None:
        for adapted in adapted_maps(self.model, self.lora):
            part = adapted.linear.part
            require(
                getattr(self.training, f"freeze_{part}"),
                f"lora.targets names maps of the {part}, such as {adapted.linear.name}, whose own weights are trained: "
                f"set training.freeze_{part} to true, or name maps of other parts",
            )
            require(
                part != "vision_model" or not self.parallel.vision_tensor_parallel,
                f"lora.targets names maps of the vision_model, such as {adapted.linear.name}: adapters of a tower that "
                "parallel.vision_tensor_parallel splits are not supported",
            )

    @property
    def schedule_iters(self) -> tuple[int, int]:
        """Last step of the learning rate's warm-up, and of its decay."""
        optimizer = self.optimizer
        share = int(optimizer.lr_warmup_fraction * self.training.train_iters)
        return (
            optimizer.lr_warmup_iters or share,
            optimizer.lr_decay_iters or self.training.train_iters,
        )

    def _check_checkpoints(self) -> None:
        checkpoint = self.checkpoint
        for name in ("mirror", "keep_best", "keep_every"):
            value = getattr(checkpoint, name)
            require(
                not value or checkpoint.save != "",
                f"checkpoint.{name} is {value}, which needs checkpoint.save, a folder",
            )
        # Nothing would have a score, and nothing would be kept for it.
        require(
            not checkpoint.keep_best
            or not checkpoint.best_metric.startswith("validation/")
            or self.training.eval_interval > 0,
            f"checkpoint.keep_best is {checkpoint.keep_best} by {checkpoint.best_metric}, which needs "
            "training.eval_interval; or name another checkpoint.best_metric, such as train/loss",
        )

    def _check_schedule(self) -> None:
        warmup, end = self.schedule_iters
        decay = self.optimizer.lr_wsd_decay_iters
        of_end = (
            "optimizer.lr_decay_iters" if self.optimizer.lr_decay_iters else "training.train_iters"
        )
        require(
            warmup < end,
            f"the learning rate rises for {warmup} steps (optimizer.lr_warmup_iters or lr_warmup_fraction), but its "
            f"decay ends at step {end} ({of_end}): fewer are needed",
        )
        require(
            warmup + decay <= end,
            f"optimizer.lr_wsd_decay_iters is {decay}, but between warm-up and step {end} ({of_end}) lie {end - warmup}",
        )

    def _check_optimizer(self) -> None:
        if not self.optimizer.use_precision_aware_optimizer:
            return
        require(
            self.training.bf16,
            "optimizer.use_precision_aware_optimizer needs training.bf16: fp32 weights have no "
            "others beside them",
        )
        require(
            self.parallel.use_distributed_optimizer,
            "optimizer.use_precision_aware_optimizer needs parallel.use_distributed_optimizer",
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
