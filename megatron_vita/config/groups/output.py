"""Output layer and loss."""

from dataclasses import dataclass

from megatron_vita.config.parsing.fields import check_fields, described


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Terms of the loss, and memory of the projection onto the vocabulary."""

    label_smoothing: float = described(
        0.0,
        "Probability mass of each target that is spread evenly over the vocabulary.",
        ge=0,
        lt=1,
    )
    z_loss: float = described(
        0.0,
        "Weight of z-loss: the squared log-sum-exp of the logits, added to each token's loss.",
        ge=0,
    )
    chunk_mib: int = described(448, "MiB of logits computed at a time.", ge=1)
    full_logits: bool = described(
        False,
        "Materialize fp32 logits of every position, as a reference: memory grows with length.",
    )

    def __post_init__(self) -> None:
        check_fields(self, "model.output.")
