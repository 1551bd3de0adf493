"""Direct preference optimization (DPO) of adapters on pairs of a chosen and a rejected answer."""

from dataclasses import dataclass

from megatron_vita.config.parsing.fields import check_fields, described


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Preference loss of pairs, with the frozen base as reference."""

    beta: float = described(
        0.0,
        "Weight of the log-probabilities' differences in DPO's loss, 0.1 as a rule; 0: train on "
        "tokens, without pairs. Needs adapters beside frozen parts: the reference is the model "
        "without them.",
        ge=0,
    )
    label_smoothing: float = described(
        0.0,
        "Probability that the answers of a pair are exchanged (conservative DPO).",
        ge=0,
        lt=0.5,
        needs=("beta",),
    )

    def __post_init__(self) -> None:
        check_fields(self, "dpo.")
