"""Length of a run, what is trained, validation and logging. Names are Megatron's."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require

RECOMPUTE = ("none", "full", "selective")
RECOMPUTE_METHODS = ("block", "uniform")
RECOMPUTE_MODULES = ("core_attn", "mlp")
RECOMPUTE_VISION_METHODS = ("layers", "tiles")


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop."""

    train_iters: int = described(1000, "Optimizer steps.")
    global_batch_size: int = described(
        8, "Packs of one optimizer step, over all data-parallel ranks."
    )
    seed: int = described(1234, "Seed of first weights.")
    bf16: bool = described(False, "Compute in bfloat16, with fp32 main weights.")
    freeze_vision_model: bool = described(False, "Leave the vision tower as it is.")
    freeze_projector: bool = described(False, "Leave the projector as it is.")
    freeze_language_model: bool = described(False, "Leave the language model as it is.")
    fit_memory: bool = described(
        False,
        "Set the fields recompute_*, mlp_chunk_tokens and activation_offload_fraction, which must be left alone, so that "
        "a run fits devices and hosts and its steps are fastest.",
    )
    recompute_granularity: str = described(
        "none", "none, full (whole layers) or selective (parts of each layer)."
    )
    recompute_method: str = described(
        "block",
        "Of full: block (the first layers of each stage, one by one) or uniform (all, in groups).",
    )
    recompute_num_layers: int = described(
        0,
        "Of full: layers of each stage that block recomputes, 0 for all; layers of a group of uniform, 0 for 1.",
    )
    recompute_modules: list[str] = described(["core_attn"], "Of selective: core_attn, mlp.")
    recompute_keep_attention_layers: int = described(
        0,
        "Of full, block: layers of each stage, the last of those recomputed, that keep attention's output, so that "
        "everything but attention is computed again; -1 for all of them.",
    )
    mlp_chunk_tokens: int = described(
        0,
        "Tokens whose MLP a tensor-parallel group computes at once where it is recomputed (full, block, or selective "
        "with mlp); 0 for all.",
    )
    activation_offload_fraction: float = described(
        0.0,
        "Of full, block: share of each stage's recomputed layers, the first ones, whose kept activations wait in pinned "
        "host memory.",
    )
    activation_offload_gib: float = described(
        0.0, "Host memory that a rank may pin for them, in GiB; 0: what the host has."
    )
    recompute_vision: bool = described(False, "Recompute the vision tower.")
    recompute_vision_method: str = described(
        "layers",
        "Of recompute_vision: layers (keeps each layer's input) or tiles (keeps pixels alone; "
        "vision_tiles_at_once tiles go through the whole tower again).",
    )
    vision_tiles_at_once: int = described(
        64, "Tiles that a rank encodes at once; more go through the tower in turns."
    )
    eval_interval: int = described(0, "Steps between validations; 0 never validates.")
    eval_iters: int = described(8, "Batches of global_batch_size packs that one validation reads.")
    log_interval: int = described(1, "Steps between log lines.")
    tensorboard_dir: str = described("", "Folder for TensorBoard; empty writes none.")
    profile_step_start: int = described(
        0, "First step that torch's profiler records, with a memory snapshot on CUDA; 0: none."
    )
    profile_step_end: int = described(0, "Last step that it records.")
    profile_ranks: list[int] = described([0], "Ranks that record.")
    profile_dir: str = described("", "Folder for traces and snapshots.")

    def __post_init__(self) -> None:
        for name in (
            "train_iters",
            "global_batch_size",
            "eval_iters",
            "log_interval",
            "vision_tiles_at_once",
        ):
            require(
                getattr(self, name) >= 1,
                f"training.{name} is {getattr(self, name)}: it must be at least 1",
            )
        self._check_recompute()
        self._check_fit()
        self._check_profile()

    def _check_fit(self) -> None:
        # the other levers need one of these
        for name, idle in (("recompute_granularity", "none"), ("recompute_vision", False)):
            value = getattr(self, name)
            require(
                not self.fit_memory or value == idle,
                f"training.{name} is {value}, but training.fit_memory chooses it: set it to {str(idle).lower()}",
            )

    def _check_profile(self) -> None:
        first = self.profile_step_start
        last = self.profile_step_end
        require(
            0 <= first <= last,
            f"training.profile_step_start is {first} and profile_step_end {last}: 0 <= start <= end is needed",
        )
        require(
            not first or self.profile_dir != "",
            f"training.profile_step_start is {first}, which needs training.profile_dir, a folder",
        )
        require(
            first > 0 or last == 0,
            f"training.profile_step_end is {last}, which needs profile_step_start of at least 1",
        )

    def _check_recompute(self) -> None:
        granularity = self.recompute_granularity
        require(
            granularity in RECOMPUTE,
            f"training.recompute_granularity is {granularity!r}; known: {', '.join(RECOMPUTE)}",
        )
        require(
            self.recompute_method in RECOMPUTE_METHODS,
            f"training.recompute_method is {self.recompute_method!r}; known: {', '.join(RECOMPUTE_METHODS)}",
        )
        full = {
            "recompute_num_layers": 0,
            "recompute_method": "block",
            "recompute_keep_attention_layers": 0,
        }
        for name, idle in full.items():
            value = getattr(self, name)
            require(
                value == idle or granularity == "full",
                f"training.{name} is {value}, which needs recompute_granularity full; it is {granularity}",
            )
        require(
            bool(self.recompute_modules) and set(self.recompute_modules) <= set(RECOMPUTE_MODULES),
            f"training.recompute_modules is {self.recompute_modules}; known: {', '.join(RECOMPUTE_MODULES)}",
        )
        require(
            self.recompute_modules == ["core_attn"] or granularity == "selective",
            f"training.recompute_modules is {self.recompute_modules}, which needs recompute_granularity selective; "
            f"it is {granularity}",
        )
        self._check_levers()

    def _check_levers(self) -> None:
        """What works on layers that are recomputed one by one."""
        kept = self.recompute_keep_attention_layers
        tokens = self.mlp_chunk_tokens
        require(
            kept >= -1,
            f"training.recompute_keep_attention_layers is {kept}: a number of layers, or -1 for all",
        )
        require(tokens >= 0, f"training.mlp_chunk_tokens is {tokens}: it must be at least 0")
        one_by_one = self.recompute_granularity == "full" and self.recompute_method == "block"
        require(
            kept == 0 or one_by_one,
            f"training.recompute_keep_attention_layers is {kept}, which needs recompute_method block: layers that are "
            f"recomputed one by one; it is {self.recompute_method}",
        )
        self._check_offload(one_by_one)
        selective = self.recompute_granularity == "selective" and "mlp" in self.recompute_modules
        require(
            tokens == 0 or one_by_one or selective,
            f"training.mlp_chunk_tokens is {tokens}, which needs the MLP recomputed: recompute_granularity full with "
            "recompute_method block, or selective with mlp among recompute_modules",
        )
        require(
            self.recompute_vision_method in RECOMPUTE_VISION_METHODS,
            f"training.recompute_vision_method is {self.recompute_vision_method!r}; known: "
            f"{', '.join(RECOMPUTE_VISION_METHODS)}",
        )
        require(
            self.recompute_vision_method == "layers" or self.recompute_vision,
            f"training.recompute_vision_method is {self.recompute_vision_method}, which needs recompute_vision",
        )

    def _check_offload(self, one_by_one: bool) -> None:
        fraction = self.activation_offload_fraction
        most = self.activation_offload_gib
        require(
            0 <= fraction <= 1,
            f"training.activation_offload_fraction is {fraction}: a share between 0 and 1",
        )
        require(
            fraction == 0 or one_by_one,
            f"training.activation_offload_fraction is {fraction}, which needs layers that are recomputed one by one: "
            "recompute_granularity full with recompute_method block",
        )
        require(most >= 0, f"training.activation_offload_gib is {most}: it must be at least 0")
        require(
            most == 0 or fraction > 0 or self.fit_memory,
            f"training.activation_offload_gib is {most}, which needs activation_offload_fraction",
        )
