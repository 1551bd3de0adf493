"""Parallel layout of the model over ranks. Field names are Megatron's."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_vita.config.parsing.fields import check_fields, described, require

AttentionBackendName = Literal["auto", "torch", "te", "fa4"]
ATTENTION_BACKENDS: tuple[AttentionBackendName, ...] = get_args(AttentionBackendName)
CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Tensor, pipeline and context parallelism; data parallelism takes the remaining ranks."""

    layout: str = described(
        "",
        "Name of a layout (docs/layouts.md), as 7b-stage3-8x80 for 8 GPUs of 80 GB: parallel sizes "
        "and memory levers in the place of those of base recipes; fields beside it, and overrides, "
        "replace its own.",
    )
    tensor_model_parallel_size: int = described(
        1, "Tensor parallelism: ranks that split each weight matrix (TP).", ge=1
    )
    pipeline_model_parallel_size: int = described(
        1, "Pipeline parallelism: stages of layers (PP).", ge=1
    )
    context_parallel_size: int = described(
        1, "Context parallelism: ranks that split each document (CP).", ge=1
    )
    sequence_parallel: bool = described(
        False,
        "Split activations outside attention and MLP along the sequence over TP.",
        needs=("tensor_model_parallel_size>1",),
    )
    cp_comm_type: CpCommType = described(
        "p2p",
        "CP communication of te: p2p (ring), all_gather, a2a (over heads) or a2a+p2p. torch and "
        "fa4 always all-gather keys and values.",
    )
    hierarchical_context_parallel_sizes: list[int] = described(
        [],
        "[ranks of the all-to-all, ranks of the ring]; their product is context_parallel_size.",
        needs=("cp_comm_type=a2a+p2p",),
    )
    vision_tensor_parallel: bool = described(
        False,
        "Split the vision tower over TP, if it is too large to replicate; tiles are then "
        "assigned over CP alone.",
        needs=("tensor_model_parallel_size>1",),
    )
    virtual_pipeline_model_parallel_size: int = described(
        1, "Interleaved chunks of layers in each stage (VPP).", ge=1
    )
    num_layers_in_first_pipeline_stage: int = described(
        0, "Layers of the first stage, which also has the vision tower; 0: split evenly.", ge=0
    )
    num_layers_in_last_pipeline_stage: int = described(
        0, "Layers of the last stage, which also has the output layer; 0: split evenly.", ge=0
    )
    overlap_grad_reduce: bool = described(
        False, "Overlap gradient reduction with the backward pass."
    )
    overlap_param_gather: bool = described(
        False,
        "Overlap the all-gather of updated weights with the forward pass.",
        needs=("overlap_grad_reduce", "use_distributed_optimizer"),
    )
    use_distributed_optimizer: bool = described(
        True, "Shard optimizer state over data-parallel ranks."
    )
    elastic: bool = described(
        False,
        "Train on as many of the ranks as make whole replicas that divide the global batch, and "
        "let the others wait; for torchrun --nnodes MIN:MAX, where ranks come and go.",
    )
    attention_backend: AttentionBackendName = described(
        "auto",
        "torch, te (Transformer Engine), fa4 (its layers with FlashAttention-4, Hopper or "
        "later), or auto: the fastest available; torch on CPU.",
    )

    def __post_init__(self) -> None:
        check_fields(self, "parallel.")
        self._check_hierarchy()

    def _check_hierarchy(self) -> None:
        sizes = self.hierarchical_context_parallel_sizes
        cp = self.context_parallel_size
        if self.cp_comm_type != "a2a+p2p":
            return
        # Two levels: an all-to-all inside a group, and a ring of groups. A level of one rank would
        # be one of the plain schemes.
        require(
            len(sizes) == 2 and min(sizes) >= 2 and sizes[0] * sizes[1] == cp,
            "parallel.cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes [heads, "
            f"ring], both at least 2, whose product is context_parallel_size {cp}; it is {sizes}",
        )

    @property
    def head_exchange_size(self) -> int:
        """CP ranks over which Transformer Engine splits heads: 1 unless cp_comm_type is a2a."""
        if self.cp_comm_type == "a2a+p2p":
            return self.hierarchical_context_parallel_sizes[0]
        if self.cp_comm_type == "a2a":
            return self.context_parallel_size
        return 1

    @property
    def virtual_size(self) -> int | None:
        """Virtual pipeline size as megatron-core expects it: None without interleaving."""
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks > 1:
            return chunks
        return None

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage.

        Raises:
            ConfigError: the layers cannot be split as the fields require.
        """
        stages = self.pipeline_model_parallel_size
        first = self.num_layers_in_first_pipeline_stage
        last = self.num_layers_in_last_pipeline_stage
        require(
            stages > 1 or not (first or last),
            "parallel.num_layers_in_..._pipeline_stage is set, but there is one stage",
        )
        given = {stage: layers for stage, layers in ((0, first), (stages - 1, last)) if layers}
        chunks = self.virtual_pipeline_model_parallel_size
        require(
            chunks == 1 or (stages > 1 and not given and num_layers % (stages * chunks) == 0),
            f"parallel.virtual_pipeline_model_parallel_size {chunks} needs several pipeline "
            f"stages without given numbers of layers, and layers ({num_layers}) that divide by "
            f"stages ({stages}) x chunks",
        )
        rest = stages - len(given)
        left = num_layers - sum(given.values())
        if rest:
            divides = left % rest == 0 and left >= rest
        else:
            divides = left == 0
        fixed = ""
        if given:
            fixed = f" of which {given} hold given numbers of layers (counted from 0)"
        require(divides, f"{num_layers} layers do not divide over {stages} pipeline stages{fixed}")
        return [given.get(stage) or left // rest for stage in range(stages)]

    @property
    def tile_ranks(self) -> int:
        """Ranks of a replica that share the tiles of a pack."""
        cp = self.context_parallel_size
        if self.vision_tensor_parallel:
            return cp
        return self.tensor_model_parallel_size * cp

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model: TP x CP x PP."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
