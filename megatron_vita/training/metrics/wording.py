"""Text descriptions of recipes, for logs and dry runs."""

from dataclasses import fields
from operator import attrgetter

from megatron_vita.config import Recipe
from megatron_vita.config.named_layouts import known_layouts
from megatron_vita.costs.memory.quantized import quantized_parameters

NOT_LEVERS = {
    "training": {
        "train_iters", "global_batch_size", "seed", "eval_interval", "eval_iters", "hang_seconds", "log_interval",
        "slow_rank_steps", "slow_rank_factor",
        "callbacks", "run_dir", "wandb_project", "wandb_exp_name", "mlflow_experiment",
        "mlflow_run_name", "mlflow_tracking_uri", "tensorboard_dir", "profile_step_start",
        "profile_step_end", "profile_ranks", "profile_dir", "freeze_vision_model",
        "freeze_projector", "freeze_language_model",
    },
    "optimizer": {
        "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_fraction", "lr_warmup_iters",
        "lr_wsd_decay_iters", "lr_wsd_decay_style", "vision_lr_mult", "vision_lr_decay", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
    },
}  # fmt: skip
"""Fields of these groups that do not trade time or precision for memory; all others do."""


def describe_layout(recipe: Recipe, *, world_size: int) -> str:
    """Format sizes and kinds of parallelism in one line."""
    parallel = recipe.parallel
    data_parallel = world_size // parallel.replica_size
    parts = [
        f"TP {parallel.tensor_model_parallel_size} x CP {parallel.context_parallel_size} x "
        f"DP {data_parallel} x PP {parallel.pipeline_model_parallel_size}"
    ]
    if parallel.virtual_size is not None:
        parts.append(f"{parallel.virtual_size} chunks a stage")
    if parallel.sequence_parallel:
        parts.append("sequence parallel")
    if parallel.context_parallel_size > 1:
        parts.append(f"CP by {parallel.cp_comm_type}")
    if parallel.use_distributed_optimizer:
        parts.append("distributed optimizer")
    return f"layout of {world_size} ranks: {', '.join(parts)}"


def describe_named_layout(recipe: Recipe) -> str:
    """Format the name of the layout that the recipe takes, and the fields that differ from it."""
    name = recipe.parallel.layout
    if not name:
        return ""
    if name not in known_layouts():
        return f"layout {name}, which docs/layouts.md no longer has"
    changed = []
    for field, value in known_layouts()[name].items():
        ours = attrgetter(field)(recipe)
        if ours != value:
            changed.append(f"{field} {ours} instead of {value}")
    return f"layout {name}" + (f", but {', '.join(changed)}" if changed else "")


def describe_levers(recipe: Recipe) -> str:
    """Format the fields that trade time or precision for memory and differ from their defaults."""
    default = Recipe()
    changed = []
    for group, others in NOT_LEVERS.items():
        ours = getattr(recipe, group)
        theirs = getattr(default, group)
        names = [field.name for field in fields(ours) if field.name not in others]
        changed += [
            f"{name} {getattr(ours, name)}"
            for name in names
            if getattr(ours, name) != getattr(theirs, name)
        ]
    return ", ".join(changed) or "none"


def describe_quantization(recipe: Recipe) -> str:
    """Format the number of parameters that are kept in 4 bits, and how; empty without any."""
    lora = recipe.lora
    if not lora.quantizes:
        return ""
    how = f"{lora.quantize_base}, blocks of {lora.quantize_block_size}"
    if lora.double_quant:
        how += ", scales in 8 bits"
    return f"{count(quantized_parameters(recipe))} in 4 bits ({how})"


def count(number: int) -> str:
    """Format a number of parameters: 1.54 B, 304.01 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
