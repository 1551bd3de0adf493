"""Checkpoint folders and retention. Field names are Megatron's."""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.parsing.fields import check_fields, described


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and loading of checkpoints.

    A run resumes from the latest checkpoint in `save`; without one it starts from `load`.
    """

    save: str = described("", "Folder for this run's checkpoints; empty: none are saved.")
    save_interval: int = described(
        500, "Steps between checkpoints; the last step is always saved.", ge=1
    )
    async_save: bool = described(
        True, "Write in a process beside each rank while training continues; false: wait for it."
    )
    retry_steps: int = described(
        10,
        "Steps after which a save that failed (full disk, lost permission) is tried again.",
        ge=1,
    )
    keep: int = described(
        2,
        "Newest checkpoints kept in `save`; others are deleted once a newer one is complete.",
        ge=1,
    )
    keep_every: int = described(
        0, "Steps whose multiples are kept besides, such as 5000; 0: none.", ge=0, needs=("save",)
    )
    keep_best: int = described(
        0, "Checkpoints with the best `best_metric` kept besides.", ge=0, needs=("save",)
    )
    best_metric: str = described(
        "validation/loss", "Metric that `keep_best` compares, as metrics.jsonl names it."
    )
    best_mode: Literal["min", "max"] = described(
        "min", "Best value of `best_metric`: min (the lowest) or max (the highest)."
    )
    mirror: str = described(
        "",
        "Folder of an object store (s3://bucket/run) to which complete checkpoints are copied "
        "while training continues, and from which a run without any in `save` resumes; empty: none.",
        needs=("save",),
    )
    load: str = described(
        "", "Checkpoint that provides the initial weights, such as the previous stage's."
    )

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint.")
