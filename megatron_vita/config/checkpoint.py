"""Checkpoint folders and retention. Field names are Megatron's."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and loading of checkpoints.

    A run resumes from the latest checkpoint in `save`; without one it starts from `load`.
    """

    save: str = described("", "Folder for this run's checkpoints; empty: none are saved.")
    save_interval: int = described(500, "Steps between checkpoints; the last step is always saved.")
    keep: int = described(
        2, "Checkpoints kept in `save`; older ones are deleted once a newer one is complete."
    )
    load: str = described(
        "", "Checkpoint that provides the initial weights, such as the previous stage's."
    )

    def __post_init__(self) -> None:
        require(
            self.save_interval >= 1,
            f"checkpoint.save_interval is {self.save_interval}: it must be at least 1",
        )
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}: it must be at least 1")
