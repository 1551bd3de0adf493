"""Optimizer and schedule, both megatron-core's, from a recipe; gradients of the replicated vision parts."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_vita.config import Recipe
from megatron_vita.errors import ConfigError
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups


def wrap_for_data_parallel(model: VitaModel, recipe: Recipe) -> DistributedDataParallel:
    """The model with gradient buffers that are reduced over data- and context-parallel ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,
    )
    wrapped = DistributedDataParallel(model.config, config, model)
    wrapped.broadcast_params()
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], recipe: Recipe
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over what is trainable, and its learning rate schedule in steps."""
    optimizer, training = recipe.optimizer, recipe.training
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
    )
    overrides = get_standard_config_overrides(config) | vision_rates(recipe)
    built = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    schedule = OptimizerParamScheduler(
        built,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=int(optimizer.lr_warmup_fraction * training.train_iters),
        lr_decay_steps=training.train_iters,
        lr_decay_style="cosine",
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=training.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run obeys the recipe of now
    )
    core = chunks[0].config  # one object for all chunks
    core.grad_scale_func = built.scale_loss
    core.finalize_model_grads_func = finalize_gradients
    if recipe.parallel.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in chunks]
        core.no_sync_func = waits if len(waits) > 1 else waits[0]
    return built, schedule


def check_state_can_be_saved(recipe: Recipe) -> None:
    """ConfigError where megatron-core could not save the optimizer's state: with torch's Adam it takes the number of
    steps from a rank's state, of which stages that train nothing have none.
    """
    stages = recipe.parallel.pipeline_model_parallel_size
    sharded = recipe.parallel.use_distributed_optimizer and not HAVE_APEX_OR_TE
    if recipe.checkpoint.save and sharded and stages > 1 and recipe.training.freeze_language_model:
        raise ConfigError(
            f"parallel.use_distributed_optimizer is true with pipeline_model_parallel_size {stages} and "
            "training.freeze_language_model: without Transformer Engine or apex the state of stages that train nothing "
            "cannot be saved; set use_distributed_optimizer to false, which costs little where little is trained"
        )


def vision_rates(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """Learning rates of the vision tower's layers, where they differ from the rest.

    Depth counts from 0 (patches, positions and class token) over 1 (first layer) to the number of layers; the factor is
    vision_lr_mult * vision_lr_decay ** (layers + 1 - depth), as in Long-VITA's layer-wise decay.
    """
    optimizer, layers = recipe.optimizer, recipe.model.vision.num_layers
    if optimizer.vision_lr_mult == optimizer.vision_lr_decay == 1.0:
        return {}
    rates: dict[ParamKey, ParamGroupOverride] = {}
    for depth in range(layers + 1):
        factor = optimizer.vision_lr_mult * optimizer.vision_lr_decay ** (layers + 1 - depth)
        part = f"vision_model.layers.{depth - 1}." if depth else "vision_model.embeddings."
        predicate = ParamWithNamePredicate(name=part, fn=lambda _, name, part=part: part in name)
        rates[ParamKey(with_name_predicate=predicate)] = ParamGroupOverride(
            max_lr=factor * optimizer.lr, min_lr=factor * optimizer.min_lr
        )
    return rates


def finalize_gradients(model: list[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """megatron-core's reduction and scaling, then the sum over TP ranks of what each has from its own tiles.

    megatron-core sums replicated gradients over TP only under sequence parallelism, and not for plain modules. All of
    it is linear, so the order does not matter.
    """
    finalize_model_grads(model, num_tokens, *args, **kwargs)
    group = groups.tensor_group()
    if group.size() == 1:
        return
    parts = [part for chunk in model for part in chunk.module.parts_with_partial_gradients()]
    grads = [p.main_grad for part in parts for p in part.parameters() if p.requires_grad]
    for work in [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]:
        work.wait()


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Gives torch's Adam its state tensors before the first step, so that a checkpoint can be loaded into them.

    Fused Adam allocates its own.
    """
    for inner in _torch_adams(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any], *, saved: Recipe, recipe: Recipe) -> None:
    """Loads an optimizer's state of a run of recipe `saved`; rates and Adam's constants are those of `recipe`.

    megatron-core knows groups of parameters by their rates, so those in the state become those of now before. It gives
    one `step` tensor to all parameters of torch's Adam, which would then count once for each.
    """
    rates = dict(zip(_rates(saved), _rates(recipe), strict=True))
    for group in _saved_groups(state):
        group["max_lr"], group["min_lr"] = rates[group["max_lr"], group["min_lr"]]
        group["betas"] = (recipe.optimizer.adam_beta1, recipe.optimizer.adam_beta2)
        group["eps"] = recipe.optimizer.adam_eps
    optimizer.load_state_dict(state)
    for inner in _torch_adams(optimizer):
        for values in inner.state.values():
            values["step"] = values["step"].clone()


def _rates(recipe: Recipe) -> list[tuple[float, float]]:
    """Highest and lowest rate of all kinds of groups, in an order that does not depend on their values."""
    others = [(rate["max_lr"], rate["min_lr"]) for rate in vision_rates(recipe).values()]
    return [(recipe.optimizer.lr, recipe.optimizer.min_lr), *others]


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The groups of parameters in an optimizer's state, which may hold those of several."""
    if isinstance(state, dict):
        yield from state.get("param_groups", [])
        for value in state.values():
            yield from _saved_groups(value)


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    parts = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [part for part in parts if isinstance(part, torch.optim.Adam | torch.optim.AdamW)]
