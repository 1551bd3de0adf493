"""Length of a run, what is trained, validation and logging. Names are Megatron's."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require

RECOMPUTE = ("none", "full", "selective")


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop."""

    train_iters: int = described(1000, "Optimizer steps.")
    global_batch_size: int = described(8, "Packs of one optimizer step, over all data-parallel ranks.")
    seed: int = described(1234, "Seed of first weights.")
    bf16: bool = described(False, "Compute in bfloat16, with fp32 main weights.")
    freeze_vision_model: bool = described(False, "Leave the vision tower as it is.")
    freeze_projector: bool = described(False, "Leave the projector as it is.")
    freeze_language_model: bool = described(False, "Leave the language model as it is.")
    recompute_granularity: str = described("none", "none, full (whole layers) or selective (attention alone).")
    recompute_num_layers: int = described(0, "Layers of each stage recomputed by full; 0: all.")
    recompute_vision: bool = described(False, "Recompute the layers of the vision tower.")
    eval_interval: int = described(0, "Steps between validations; 0 never validates.")
    eval_iters: int = described(8, "Batches of global_batch_size packs that one validation reads.")
    log_interval: int = described(1, "Steps between log lines.")
    tensorboard_dir: str = described("", "Folder for TensorBoard; empty writes none.")

    def __post_init__(self) -> None:
        for name in ("train_iters", "global_batch_size", "eval_iters", "log_interval"):
            require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}: it must be at least 1")
        require(
            self.recompute_granularity in RECOMPUTE,
            f"training.recompute_granularity is {self.recompute_granularity!r}; known: {', '.join(RECOMPUTE)}",
        )
        require(
            not self.recompute_num_layers or self.recompute_granularity == "full",
            f"training.recompute_num_layers is {self.recompute_num_layers}, which needs recompute_granularity full",
        )
        require(
            not (self.freeze_vision_model and self.freeze_projector and self.freeze_language_model),
            "training freezes the vision model, the projector and the language model: nothing is left to train",
        )
