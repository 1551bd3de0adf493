"""How the model is spread over ranks. Names are Megatron's."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require

ATTENTION_BACKENDS = ("auto", "torch", "te")


@dataclass(kw_only=True)
class ParallelConfig:
    """Tensor, pipeline and context parallelism; what is left of the world is data parallelism."""

    tensor_model_parallel_size: int = described(1, "Ranks that share each weight matrix (TP).")
    pipeline_model_parallel_size: int = described(1, "Ranks that share the layers in sequence (PP).")
    context_parallel_size: int = described(1, "Ranks that share each document's tokens (CP).")
    sequence_parallel: bool = described(False, "Split activations between layers along the sequence over TP.")
    use_distributed_optimizer: bool = described(True, "Split optimizer state over data-parallel ranks.")
    attention_backend: str = described("auto", "torch, te (Transformer Engine), or auto: te on CUDA, torch on CPU.")

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            require(getattr(self, name) >= 1, f"parallel.{name} is {getattr(self, name)}: it must be at least 1")
        require(
            self.attention_backend in ATTENTION_BACKENDS,
            f"parallel.attention_backend is {self.attention_backend!r}; known: {', '.join(ATTENTION_BACKENDS)}",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel needs tensor_model_parallel_size of at least 2, which is 1",
        )

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the model (TP x CP x PP)."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
