"""megatron-core's optimizer and schedule from a recipe; gradients of the replicated vision
parts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_vita import platform
from megatron_vita.config import OptimizerConfig, Recipe
from megatron_vita.errors import PlatformError
from megatron_vita.model.lora import ADAPTER, is_adapter
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.training.optimizer.schedule import build_schedule

BUCKET_SIZE = 40_000_000
BUCKET_SIZE_PER_RANK = 1_000_000
"""Gradients in a bucket, at the least: megatron-core's own defaults where it makes several."""

_TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,  # megatron-core's and Transformer Engine's word for it
}


class CheckedOptimizer(ChainedOptimizer):
    """megatron-core's optimizer, with a check between the gradient norm and the update.

    may_update: called by `step` with the gradient norm; if it returns false, weights and state stay
        as they are.
    """

    may_update: Callable[[float | torch.Tensor], bool] | None = None
    _grad_norm: float | torch.Tensor = 0.0

    def get_grad_norm(self) -> float | torch.Tensor:
        """Compute the norm of all gradients, over all ranks."""
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Update the weights with clipped gradients, if they may be; return whether they were."""
        if self.may_update is not None and not self.may_update(self._grad_norm):
            return False
        return bool(super().step_with_ready_grads())


def check_optimizer(recipe: Recipe) -> None:
    """Check that this machine supports the optimizer's settings.

    Raises:
        PlatformError: a package or CUDA is missing.
    """
    if not recipe.optimizer.use_precision_aware_optimizer:
        return
    if platform.on_cuda() and platform.has_transformer_engine():
        return
    missing = "Transformer Engine" if platform.on_cuda() else "CUDA"
    raise PlatformError(
        f"optimizer.use_precision_aware_optimizer is true, but {missing} is not present; leave it false here: a "
        "checkpoint can be resumed with either setting"
    )


def wrap_for_data_parallel(model: VitaModel, recipe: Recipe) -> DistributedDataParallel:
    """Wrap the model with gradient buffers that are reduced over DP and CP ranks.

    A distributed optimizer gathers its state for a checkpoint by the buckets of these buffers, on
    the device. By default, megatron-core makes one bucket of all gradients, except on the first
    stage with early reduction.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.optimizer.main_grads_dtype == "fp32",
        reduce_scatter_with_fp32_accumulation=recipe.optimizer.reduce_scatter_with_fp32_accumulation,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,
    )
    ranks = groups.data_parallel_group(with_context_parallel=True).size()
    layout = None
    if config.use_distributed_optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        size = max(BUCKET_SIZE, BUCKET_SIZE_PER_RANK * ranks)
        layout = DistributedOptimizer.compute_full_param_layout(trained, size, ranks, config)
    wrapped = DistributedDataParallel(model.config, config, model, full_param_layout=layout)
    wrapped.broadcast_params()
    if config.grad_reduce_in_fp32:  # sums over pieces and packs in bf16 would lose too much
        _add_products_to_main_gradients(model)
    return wrapped


def _add_products_to_main_gradients(model: VitaModel) -> None:
    """Let Transformer Engine's layers add weight gradients to `main_grad` in the matrix product.

    It saves a pass over each weight for every product.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def build_optimizer(
    chunks: list[DistributedDataParallel], recipe: Recipe
) -> tuple[CheckedOptimizer, OptimizerParamScheduler]:
    """Build AdamW over the trained parameters, and its learning rate schedule in steps."""
    optimizer = recipe.optimizer
    training = recipe.training
    config = CoreOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.bf16,
        params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        **_precision(optimizer),
    )
    overrides = get_standard_config_overrides(config) | special_rates(recipe)
    chained = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    built = CheckedOptimizer(chained.chained_optimizers)
    schedule = build_schedule(built, recipe)
    core = chunks[0].config  # one object for all chunks
    core.grad_scale_func = built.scale_loss
    core.finalize_model_grads_func = finalize_gradients
    if recipe.parallel.overlap_grad_reduce:
        # megatron-core takes a list for interleaved chunks alone.
        waits = [chunk.no_sync for chunk in chunks]
        core.no_sync_func = waits if len(waits) > 1 else waits[0]
    return built, schedule


def _precision(optimizer: OptimizerConfig) -> dict[str, Any]:
    """Return megatron-core's fields for types and devices of the optimizer's state."""
    if not optimizer.use_precision_aware_optimizer:
        return {}
    types = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    others = (
        "use_precision_aware_optimizer",
        "store_param_remainders",
        "optimizer_cpu_offload",
        "optimizer_offload_fraction",
        "overlap_cpu_optimizer_d2h_h2d",
    )
    fields = {name: _TYPES[getattr(optimizer, name)] for name in types}
    return fields | {name: getattr(optimizer, name) for name in others}


def special_rates(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """Return the learning rates of parameters that have another one than the rest."""
    return _vision_rates(recipe) | _adapter_rates(recipe)


def _adapter_rates(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """Return the learning rate of the adapters, whatever part they are in."""
    if not recipe.lora.rank:
        return {}
    optimizer = recipe.optimizer
    factor = (recipe.lora.lr or optimizer.lr) / optimizer.lr
    predicate = ParamWithNamePredicate(name=ADAPTER, fn=lambda _, name: is_adapter(name))
    rate = ParamGroupOverride(max_lr=factor * optimizer.lr, min_lr=factor * optimizer.min_lr)
    return {ParamKey(with_name_predicate=predicate): rate}


def _vision_rates(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """Return the learning rates of the vision tower's layers, where they differ from the rest.

    Depth counts from 0 (patches, positions and class token) over 1 (first layer) to the number of
    layers; the factor is vision_lr_mult * vision_lr_decay ** (layers + 1 - depth), as in
    Long-VITA's layer-wise decay.
    """
    optimizer = recipe.optimizer
    layers = recipe.model.vision.num_layers
    if optimizer.vision_lr_mult == optimizer.vision_lr_decay == 1.0:
        return {}
    rates: dict[ParamKey, ParamGroupOverride] = {}
    for depth in range(layers + 1):
        factor = optimizer.vision_lr_mult * optimizer.vision_lr_decay ** (layers + 1 - depth)
        part = f"vision_model.layers.{depth - 1}." if depth else "vision_model.embeddings."
        # `part=part` binds the part of this turn: the function is called after the loop.
        predicate = ParamWithNamePredicate(
            name=part, fn=lambda _, name, part=part: part in name and not is_adapter(name)
        )
        rates[ParamKey(with_name_predicate=predicate)] = ParamGroupOverride(
            max_lr=factor * optimizer.lr, min_lr=factor * optimizer.min_lr
        )
    return rates


def finalize_gradients(
    model: list[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any
) -> None:
    """Reduce and scale gradients as megatron-core does, then sum over TP those of each rank's
    tiles.

    megatron-core sums replicated gradients over TP only under sequence parallelism, and not for
    plain modules. All of it is linear, so the order does not matter.
    """
    finalize_model_grads(model, num_tokens, *args, **kwargs)
    group = groups.tensor_group()
    if group.size() == 1:
        return
    parts = [part for chunk in model for part in chunk.module.parts_with_partial_gradients()]
    grads = [p.main_grad for part in parts for p in part.parameters() if p.requires_grad]
    # All reductions are in flight at once, since most of them are small.
    for work in [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]:
        work.wait()
