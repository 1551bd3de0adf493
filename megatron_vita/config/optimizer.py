"""Adam and its learning rate schedule. Names are Megatron's."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with cosine decay after a linear warm-up."""

    lr: float = described(1e-4, "Peak learning rate.")
    min_lr: float = described(0.0, "Learning rate at the end.")
    lr_warmup_fraction: float = described(
        0.03, "Share of train_iters over which the learning rate rises."
    )
    vision_lr_mult: float = described(1.0, "Factor on the vision tower's learning rate.")
    vision_lr_decay: float = described(
        1.0, "Factor on it for each layer of the tower from the last to the first."
    )
    weight_decay: float = described(0.0, "Weight decay; biases and vectors are spared.")
    adam_beta1: float = described(0.9, "Decay of Adam's mean.")
    adam_beta2: float = described(0.999, "Decay of Adam's variance.")
    adam_eps: float = described(1e-8, "Epsilon of Adam.")
    clip_grad: float = described(1.0, "Largest global gradient norm; 0 does not clip.")

    def __post_init__(self) -> None:
        require(
            0 <= self.min_lr <= self.lr,
            f"optimizer.min_lr is {self.min_lr} and lr {self.lr}: 0 <= min_lr <= lr is needed",
        )
        for name in ("lr", "vision_lr_mult", "vision_lr_decay"):
            require(
                getattr(self, name) > 0,
                f"optimizer.{name} is {getattr(self, name)}: it must be positive",
            )
        require(
            0 <= self.lr_warmup_fraction < 1,
            f"optimizer.lr_warmup_fraction is {self.lr_warmup_fraction}: it must be at least 0 and below 1",
        )
