"""The learning rate's schedule: megatron-core's, from a recipe."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vita.config import Recipe
from megatron_vita.config.groups.optimizer import SCHEDULES


class RegisteredSchedule(OptimizerParamScheduler):
    """A schedule whose course between warm-up and the end of the decay was registered."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Compute the learning rate of a group of parameters at `num_steps`."""
        warms_up = self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps
        if warms_up or self.num_steps > self.lr_decay_steps:
            return super().get_lr(param_group)
        highest = _own_or(param_group.get("max_lr"), self.max_lr)
        lowest = _own_or(param_group.get("min_lr"), self.min_lr)
        steps = self.lr_decay_steps - self.lr_warmup_steps
        course = SCHEDULES[self.lr_decay_style]
        assert course is not None
        return lowest + (highest - lowest) * course((self.num_steps - self.lr_warmup_steps) / steps)


def _own_or(own: float | None, common: float) -> float:
    """Return the group's own bound, which megatron-core may set to None, or the common one."""
    if own is None:
        return common
    return own


def build_schedule(built: MegatronOptimizer, recipe: Recipe) -> OptimizerParamScheduler:
    """The schedule of an optimizer's learning rates, counted in steps. A resumed run obeys the
    recipe of now."""
    optimizer = recipe.optimizer
    warmup, end = recipe.schedule_iters
    course = SCHEDULES[optimizer.lr_decay_style]
    kind = OptimizerParamScheduler if course is None else RegisteredSchedule
    return kind(
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
