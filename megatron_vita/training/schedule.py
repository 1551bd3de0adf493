"""The learning rate's schedule: megatron-core's, from a recipe."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vita.config import Recipe


def build_schedule(built: MegatronOptimizer, recipe: Recipe) -> OptimizerParamScheduler:
    """The schedule of an optimizer's learning rates, counted in steps. A resumed run obeys the
    recipe of now."""
    optimizer = recipe.optimizer
    warmup, end = recipe.schedule_iters
    return OptimizerParamScheduler(
        built,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=end,
        lr_decay_style=optimizer.lr_decay_style,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=recipe.training.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optimizer.lr_wsd_decay_iters or None,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style,
    )
