"""Callbacks of a run, from its recipe and from the caller."""

from collections.abc import Iterator, Sequence

from megatron_vita.training.callbacks.callback import Callback
from megatron_vita.training.callbacks.console import LogCallback
from megatron_vita.training.callbacks.damage import DamageCallback
from megatron_vita.training.callbacks.hooks import Hooks
from megatron_vita.training.callbacks.importing import import_callbacks
from megatron_vita.training.callbacks.profiling import ProfileCallback
from megatron_vita.training.callbacks.recording import RecordCallback
from megatron_vita.training.callbacks.saving import SaveCallback
from megatron_vita.training.callbacks.tensorboard import TensorBoardCallback
from megatron_vita.training.callbacks.validation import ValidationCallback
from megatron_vita.training.run import Run


def build_hooks(run: Run, callbacks: Sequence[Callback] = ()) -> Hooks:
    """Collect the given callbacks, those named by the recipe, and those for its settings, in this
    order.

    So metrics that others record after a step are in its log, which precedes saving; what can fail
    comes after saving.
    """
    hooks = Hooks(run, callbacks)
    hooks.callbacks += import_callbacks(run.recipe.training.callbacks)
    hooks.callbacks += _own_callbacks(run, hooks)
    return hooks


def _own_callbacks(run: Run, hooks: Hooks) -> Iterator[Callback]:
    recipe = run.recipe
    yield LogCallback()
    if recipe.training.tensorboard_dir:
        yield TensorBoardCallback(recipe.training.tensorboard_dir, step=run.step)
    yield RecordCallback(hooks)
    yield DamageCallback(run)
    if recipe.training.profile_step_start:
        yield ProfileCallback(recipe.training)
    if recipe.checkpoint.save:
        yield SaveCallback(hooks)
    if run.validation_stream is not None:
        yield ValidationCallback(hooks)
