"""Output layer and loss."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(kw_only=True)
class OutputConfig:
    """Terms of the loss, and memory of the projection onto the vocabulary."""

    label_smoothing: float = described(
        0.0, "Probability mass of each target that is spread evenly over the vocabulary."
    )
    z_loss: float = described(
        0.0, "Weight of z-loss: the squared log-sum-exp of the logits, added to each token's loss."
    )
    chunk_mib: int = described(448, "MiB of logits computed at a time.")
    full_logits: bool = described(
        False,
        "Materialize fp32 logits of every position, as a reference: memory grows with length.",
    )

    def __post_init__(self) -> None:
        require(
            0.0 <= self.label_smoothing < 1.0,
            f"model.output.label_smoothing is {self.label_smoothing}: it must be at least 0 and "
            "below 1",
        )
        require(
            self.z_loss >= 0.0, f"model.output.z_loss is {self.z_loss}: it must not be negative"
        )
        require(
            self.chunk_mib >= 1,
            f"model.output.chunk_mib is {self.chunk_mib}: it must be at least 1",
        )
