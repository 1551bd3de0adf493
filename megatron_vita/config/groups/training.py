"""Length of a run, frozen parts, recomputation, validation and logging. Names are Megatron's."""

from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.groups.callback import CallbackConfig
from megatron_vita.config.parsing.fields import check_fields, described, require

RecomputeModule = Literal["core_attn", "mlp"]

ONE_BY_ONE = ("recompute_granularity=full", "recompute_method=block")
"""Fields with which layers are recomputed one by one."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    train_iters: int = described(1000, "Optimizer steps.", ge=1)
    global_batch_size: int = described(8, "Packs of one optimizer step, over all replicas.", ge=1)
    seed: int = described(1234, "Seed of initial weights.")
    bf16: bool = described(False, "Compute in bfloat16, with fp32 main weights.")
    fp8_recipe: Literal["none", "tensorwise", "blockwise"] = described(
        "none",
        "8-bit linear layers of the language model by Transformer Engine, in both passes: none, "
        "tensorwise (a scale for each tensor) or blockwise (for each 128 values), with "
        "attention_backend te or fa4.",
        needs=("bf16",),
    )
    freeze_vision_model: bool = described(False, "Freeze the vision tower.")
    freeze_projector: bool = described(False, "Freeze the projector.")
    freeze_language_model: bool = described(False, "Freeze the language model.")
    fit_memory: bool = described(
        False,
        "Choose recompute_*, mlp_chunk_tokens and activation_offload_fraction, which must keep "
        "their defaults, so that the run fits the memory of devices and hosts and its steps are "
        "fastest.",
    )
    recompute_granularity: Literal["none", "full", "selective"] = described(
        "none",
        "Activation recomputation: none, full (whole layers) or selective (parts of each layer).",
    )
    recompute_method: Literal["block", "uniform"] = described(
        "block",
        "block (the first layers of each stage, one by one) or uniform (all, in groups).",
        needs=("recompute_granularity=full",),
    )
    recompute_num_layers: int = described(
        0,
        "Recomputed layers per stage for block (0: all), layers per group for uniform (0: 1).",
        ge=0,
        needs=("recompute_granularity=full",),
    )
    recompute_modules: list[RecomputeModule] = described(
        ["core_attn"],
        "Recomputed parts of each layer.",
        min_length=1,
        needs=("recompute_granularity=selective",),
    )
    recompute_keep_attention_layers: int = described(
        0,
        "Recomputed layers per stage, from the last, that keep the output of attention, so that "
        "all but attention is recomputed; -1: all.",
        ge=-1,
        needs=ONE_BY_ONE,
    )
    mlp_chunk_tokens: int = described(
        0,
        "Tokens that a tensor-parallel group runs through a recomputed MLP at a time (full with "
        "block, or selective with mlp); 0: all.",
        ge=0,
    )
    activation_offload_fraction: float = described(
        0.0,
        "Fraction of the recomputed layers per stage, from the first, whose kept activations are "
        "offloaded to pinned host memory.",
        ge=0,
        le=1,
        needs=ONE_BY_ONE,
    )
    activation_offload_gib: float = described(
        0.0,
        "Pinned host memory of a rank for offloading, in GiB; 0: as much as the host has.",
        ge=0,
    )
    recompute_vision: bool = described(False, "Recompute the vision tower.")
    recompute_vision_method: Literal["layers", "tiles"] = described(
        "layers",
        "layers (keep each layer's input) or tiles (keep pixels alone and run "
        "vision_tiles_at_once tiles through the whole tower again).",
        needs=("recompute_vision",),
    )
    vision_tiles_at_once: int = described(
        64, "Tiles that a rank encodes in one forward pass of the tower.", ge=1
    )
    eval_interval: int = described(0, "Steps between validations; 0: no validation.", ge=0)
    eval_iters: int = described(8, "Batches of global_batch_size packs in a validation.", ge=1)
    log_interval: int = described(1, "Steps between log lines.", ge=1)
    hang_seconds: float = described(
        1200.0,
        "Seconds in which no rank makes progress, after which the run reports where all ranks are "
        "and ends with exit code 75; 0: never.",
        ge=0,
    )
    slow_rank_steps: int = described(
        100,
        "Steps between comparisons of the ranks' times, which name slow ones in the log; 0: none.",
        ge=0,
    )
    slow_rank_factor: float = described(
        1.5,
        "Times as long as the median of its pipeline stage that a slow rank takes, without its "
        "waits for others.",
        gt=1,
    )
    run_dir: str = described(
        "",
        "Folder of the run's recipe, environment, log and metrics.jsonl; empty: checkpoint.save.",
    )
    tensorboard_dir: str = described("", "Folder for TensorBoard events; empty: none are written.")
    wandb_project: str = described(
        "", "Project of Weights & Biases that gets all metrics; empty: none. Needs wandb."
    )
    wandb_exp_name: str = described(
        "", "Name of the run there; empty: one that it makes up.", needs=("wandb_project",)
    )
    mlflow_experiment: str = described(
        "", "MLflow experiment that gets all metrics; empty: none. Needs mlflow-skinny."
    )
    mlflow_run_name: str = described(
        "", "Name of the run there; empty: one that it makes up.", needs=("mlflow_experiment",)
    )
    mlflow_tracking_uri: str = described(
        "",
        "MLflow's server or a local folder; empty: MLFLOW_TRACKING_URI says.",
        needs=("mlflow_experiment",),
    )
    callbacks: list[CallbackConfig] = described(
        [],
        "Classes derived from megatron_vita.training.callbacks.Callback: [my_module.MyCallback], or with arguments "
        "[{path: my_module.MyCallback, arguments: {threshold: 3}}].",
    )
    profile_step_start: int = described(
        0,
        "First step recorded by torch.profiler, with a memory snapshot on CUDA; 0: none.",
        ge=0,
        needs=("profile_dir",),
    )
    profile_step_end: int = described(0, "Last recorded step.", ge=0, needs=("profile_step_start",))
    profile_ranks: list[int] = described([0], "Ranks that record a profile.")
    profile_dir: str = described("", "Folder for traces and snapshots.")

    def __post_init__(self) -> None:
        check_fields(self, "training.")
        self._check_recompute()
        self._check_fit()
        self._check_profile()

    def _check_fit(self) -> None:
        # The other levers need one of these two, so that their own checks catch the rest.
        for name, idle in (("recompute_granularity", "none"), ("recompute_vision", False)):
            value = getattr(self, name)
            require(
                not self.fit_memory or value == idle,
                f"training.{name} is {value}, but training.fit_memory chooses it: set it to "
                f"{str(idle).lower()}",
            )

    def _check_profile(self) -> None:
        first = self.profile_step_start
        last = self.profile_step_end
        require(
            first <= last,
            f"training.profile_step_start is {first} and profile_step_end {last}: start <= end is "
            "needed",
        )

    def _check_recompute(self) -> None:
        tokens = self.mlp_chunk_tokens
        one_by_one = self.recompute_granularity == "full" and self.recompute_method == "block"
        selective = self.recompute_granularity == "selective" and "mlp" in self.recompute_modules
        require(
            tokens == 0 or one_by_one or selective,
            f"training.mlp_chunk_tokens is {tokens}, which needs the MLP recomputed: "
            "recompute_granularity full with recompute_method block, or selective with mlp among "
            "recompute_modules",
        )
        most = self.activation_offload_gib
        require(
            most == 0 or self.activation_offload_fraction > 0 or self.fit_memory,
            f"training.activation_offload_gib is {most}, which needs activation_offload_fraction",
        )
