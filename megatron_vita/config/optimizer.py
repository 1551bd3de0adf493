"""Adam and its learning rate schedule. Names are Megatron's."""

from dataclasses import dataclass, replace

from megatron_vita.config.fields import described, require

GRADIENT_TYPES = ("fp32", "bf16")
WEIGHT_TYPES = ("fp32", "fp16")
MOMENT_TYPES = ("fp32", "bf16", "fp16", "fp8")
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
"""Settings of an optimizer that runs everywhere."""


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
    use_precision_aware_optimizer: bool = described(
        False,
        "Transformer Engine's Adam keeps the weights of its own, in the types below. Needs CUDA, bf16 and "
        "use_distributed_optimizer.",
    )
    main_grads_dtype: str = described(
        "fp32", "Type in which gradients are added up over packs and reduced: fp32 or bf16."
    )
    main_params_dtype: str = described(
        "fp32", "Type of Adam's own weights: fp32, or fp16 with a scale for each parameter."
    )
    exp_avg_dtype: str = described("fp32", "Type of Adam's mean: fp32, bf16, fp16 or fp8.")
    exp_avg_sq_dtype: str = described("fp32", "Type of Adam's variance: fp32, bf16, fp16 or fp8.")
    store_param_remainders: bool = described(
        False,
        "Keep of fp32 weights only the 16 bits that bf16 weights lack: the same numbers in half the memory.",
    )
    reduce_scatter_with_fp32_accumulation: bool = described(
        False, "Sum bf16 gradients of replicas in fp32, by an all-to-all."
    )
    optimizer_cpu_offload: bool = described(
        False, "Keep Adam's state in host memory and update those weights on the CPU."
    )
    optimizer_offload_fraction: float = described(
        1.0, "Share of the parameters to which optimizer_cpu_offload applies."
    )
    overlap_cpu_optimizer_d2h_h2d: bool = described(
        False,
        "Update on the CPU parameter by parameter, beside the copies of gradients and weights.",
    )

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
        self._check_types()
        self._check_offload()

    def in_full_precision(self) -> "OptimizerConfig":
        """The same optimizer where Transformer Engine is not present."""
        return replace(self, **FULL_PRECISION)  # type: ignore[arg-type]

    def _check_types(self) -> None:
        choices = {
            "main_grads_dtype": GRADIENT_TYPES,
            "main_params_dtype": WEIGHT_TYPES,
            "exp_avg_dtype": MOMENT_TYPES,
            "exp_avg_sq_dtype": MOMENT_TYPES,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"optimizer.{name} is {value!r}; known: {', '.join(known)}")
            require(
                value == "fp32" or self.use_precision_aware_optimizer,
                f"optimizer.{name} is {value}, which needs optimizer.use_precision_aware_optimizer",
            )
        for name in ("store_param_remainders", "optimizer_cpu_offload"):
            require(
                not getattr(self, name) or self.use_precision_aware_optimizer,
                f"optimizer.{name} needs optimizer.use_precision_aware_optimizer",
            )
        require(
            not self.store_param_remainders or self.main_params_dtype == "fp32",
            f"optimizer.store_param_remainders needs main_params_dtype fp32, which is {self.main_params_dtype}",
        )
        require(
            not self.reduce_scatter_with_fp32_accumulation or self.main_grads_dtype == "bf16",
            "optimizer.reduce_scatter_with_fp32_accumulation needs main_grads_dtype bf16: fp32 gradients are summed "
            "in fp32 without it",
        )

    def _check_offload(self) -> None:
        require(
            0 < self.optimizer_offload_fraction <= 1,
            f"optimizer.optimizer_offload_fraction is {self.optimizer_offload_fraction}: it must be above 0 and at "
            "most 1",
        )
        for name in ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"):
            require(
                self.optimizer_cpu_offload or getattr(self, name) == FULL_PRECISION[name],
                f"optimizer.{name} is {getattr(self, name)}, which needs optimizer.optimizer_cpu_offload",
            )
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
                f"optimizer.{name} is {getattr(self, name)}, but optimizer_cpu_offload keeps weights and moments whole "
                "in fp32, those on the device too",
            )
