"""Rules for NaN, infinities and spikes of a step's loss and gradient norm, and for weights.

`rolling_interval_length` and `sigma_factor` are OLMo-core's names.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.parsing.fields import check_fields, described

NonfiniteAction = Literal["stop", "skip", "rollback"]
SpikeAction = Literal["none", "stop", "skip", "rollback"]


@dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Reaction to loss and gradient norm of a step, which all ranks judge alike; comparison of
    replicas."""

    nonfinite_action: NonfiniteAction = described(
        "stop",
        "Reaction to a loss or gradient norm that is NaN or infinite: stop (exit code 1), skip "
        "(the step leaves weights and optimizer as they are) or rollback (go back by "
        "rollback_steps and leave out the packs since then).",
    )
    spike_action: SpikeAction = described(
        "none",
        "Reaction to a loss or gradient norm far above those of the last steps: none, stop, skip "
        "or rollback.",
    )
    rolling_interval_length: int = described(
        128,
        "Steps whose losses and gradient norms a step is compared with; half of them are needed.",
        ge=2,
    )
    sigma_factor: float = described(
        6.0, "Standard deviations above the mean of these steps from which on it is a spike.", gt=0
    )
    max_consecutive_skips: int = described(
        10, "Steps skipped in a row, after which the next one to skip stops the run.", ge=1
    )

    rollback_steps: int = described(
        1, "Steps that a rollback takes back, the faulty one among them.", ge=1
    )
    max_rollbacks: int = described(
        3, "Rollbacks of a run, over all of its starts, after which the next one stops it.", ge=1
    )

    compare_weights_steps: int = described(
        0,
        "Compare the replicas' weights (by hash) every so many steps and before each save; the run "
        "stops if they differ; 0: never.",
        ge=0,
    )

    def __post_init__(self) -> None:
        check_fields(self, "numerics.")

    @property
    def may_roll_back(self) -> bool:
        """True if a rule rolls the run back."""
        return "rollback" in (self.nonfinite_action, self.spike_action)
