"""AdamW, its precision and its learning rate schedule. Field names are Megatron's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.parsing.build import replaced
from megatron_vita.config.parsing.fields import check_fields, described, require
from megatron_vita.registry import Registry

Course = Callable[[float], float]
"""Share of the way from min_lr to lr that is left once a share of the decay's steps is done."""
_OWN: dict[str, Course | None] = dict.fromkeys(
    ("constant", "linear", "cosine", "WSD", "inverse-square-root")
)
SCHEDULES: Registry[Course | None] = Registry("schedule", _OWN)
"""Courses of the learning rate after warm-up; None for those that megatron-core computes."""
WsdStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]

MomentType = Literal["fp32", "bf16", "fp16", "fp8"]
FULL_PRECISION = {
    "use_precision_aware_optimizer": False,
    "main_grads_dtype": "fp32",
    "main_params_dtype": "fp32",
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "store_param_remainders": False,
    "reduce_scatter_with_fp32_accumulation": False,
    "optimizer_cpu_offload": False,
    "optimizer_offload_fraction": 1.0,
    "overlap_cpu_optimizer_d2h_h2d": False,
}
"""Settings of an optimizer in plain fp32, which needs no Transformer Engine."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, with a learning rate schedule that begins with a linear warm-up."""

    lr: float = described(1e-4, "Peak learning rate.", gt=0)
    min_lr: float = described(0.0, "Learning rate at the end of the decay.", ge=0)
    lr_decay_style: str = described(
        "cosine",
        "Learning rate after warm-up: constant, linear, cosine, WSD (stable at lr, then a decay of lr_wsd_decay_iters) or "
        "inverse-square-root (lr * sqrt(warm-up steps / steps), at least min_lr), or one that a plugin registers.",
        choices=SCHEDULES,
    )
    lr_decay_iters: int = described(
        0, "Step at which the learning rate reaches min_lr, and stays there; 0: train_iters.", ge=0
    )
    lr_warmup_iters: int = described(
        0, "Steps of the linear warm-up from 0; 0: lr_warmup_fraction of train_iters.", ge=0
    )
    lr_warmup_fraction: float = described(
        0.03, "Fraction of train_iters for the linear warm-up.", ge=0, lt=1
    )
    lr_wsd_decay_iters: int = described(
        0, "Of WSD: steps of the decay, which ends at lr_decay_iters.", ge=0
    )
    lr_wsd_decay_style: WsdStyle = described("exponential", "Of WSD: course of the decay.")
    vision_lr_mult: float = described(1.0, "Multiplier of the vision tower's learning rate.", gt=0)
    vision_lr_decay: float = described(
        1.0,
        "Layer-wise decay of the tower's learning rate, per layer from the last to the first.",
        gt=0,
    )
    weight_decay: float = described(
        0.0, "Weight decay, not applied to biases and other one-dimensional parameters.", ge=0
    )
    adam_beta1: float = described(0.9, "Decay rate of Adam's first moment.", ge=0, lt=1)
    adam_beta2: float = described(0.999, "Decay rate of Adam's second moment.", ge=0, lt=1)
    adam_eps: float = described(1e-8, "Epsilon of Adam.", gt=0)
    clip_grad: float = described(
        1.0, "Global gradient norm to which gradients are clipped; 0: no clipping.", ge=0
    )
    use_precision_aware_optimizer: bool = described(
        False,
        "Use Transformer Engine's Adam, which keeps main weights and moments in the dtypes "
        "below. Needs CUDA, bf16 and use_distributed_optimizer.",
    )
    main_grads_dtype: Literal["fp32", "bf16"] = described(
        "fp32",
        "Dtype for accumulating gradients over packs and reducing them.",
        needs=("use_precision_aware_optimizer",),
    )
    main_params_dtype: Literal["fp32", "fp16"] = described(
        "fp32",
        "Dtype of main weights: fp32, or fp16 with a scale for each parameter.",
        needs=("use_precision_aware_optimizer",),
    )
    exp_avg_dtype: MomentType = described(
        "fp32", "Dtype of the first moment.", needs=("use_precision_aware_optimizer",)
    )
    exp_avg_sq_dtype: MomentType = described(
        "fp32", "Dtype of the second moment.", needs=("use_precision_aware_optimizer",)
    )
    store_param_remainders: bool = described(
        False,
        "Store only the 16 bits of fp32 main weights that the bf16 weights lack: the same values "
        "in half the memory.",
        needs=("use_precision_aware_optimizer", "main_params_dtype=fp32"),
    )
    reduce_scatter_with_fp32_accumulation: bool = described(
        False,
        "Reduce bf16 gradients over replicas by an all-to-all with fp32 accumulation.",
        needs=("main_grads_dtype=bf16",),
    )
    optimizer_cpu_offload: bool = described(
        False,
        "Keep optimizer state in host memory and update its weights on the CPU.",
        needs=("use_precision_aware_optimizer",),
    )
    optimizer_offload_fraction: float = described(
        1.0,
        "Fraction of the parameters to offload.",
        gt=0,
        le=1,
        needs=("optimizer_cpu_offload",),
    )
    overlap_cpu_optimizer_d2h_h2d: bool = described(
        False,
        "Overlap CPU updates with the copies of gradients and weights, parameter by parameter.",
        needs=("optimizer_cpu_offload",),
    )

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr is {self.min_lr} and lr {self.lr}: 0 <= min_lr <= lr is needed",
        )
        self._check_schedule()
        self._check_offload()

    def _check_schedule(self) -> None:
        is_wsd = self.lr_decay_style == "WSD"
        require(
            is_wsd == (self.lr_wsd_decay_iters > 0),
            f"optimizer.lr_wsd_decay_iters is {self.lr_wsd_decay_iters} with lr_decay_style {self.lr_decay_style}: WSD "
            "needs at least 1, the others 0",
        )
        for name in ("min_lr", "lr_decay_iters"):
            require(
                self.lr_decay_style != "constant" or not getattr(self, name),
                f"optimizer.{name} is {getattr(self, name)}, but with lr_decay_style constant the learning rate stays "
                "at lr: set it to 0",
            )

    def in_full_precision(self) -> "OptimizerConfig":
        """Return this configuration in plain fp32, for devices without Transformer Engine."""
        return replaced(self, FULL_PRECISION)

    def _check_offload(self) -> None:
        if not self.optimizer_cpu_offload:
            return
        for name in (
            "main_params_dtype",
            "exp_avg_dtype",
            "exp_avg_sq_dtype",
            "store_param_remainders",
        ):
            require(
                getattr(self, name) == FULL_PRECISION[name],
                f"optimizer.{name} is {getattr(self, name)}, but optimizer_cpu_offload keeps "
                "weights and moments whole in fp32, those on the device too",
            )
