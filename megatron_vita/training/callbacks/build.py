"""Callbacks of a run, from its recipe and from the caller."""

from collections.abc import Iterator, Sequence

import torch.distributed as dist

from megatron_vita.config.run_files import run_folder
from megatron_vita.training.callbacks.console import LogCallback
from megatron_vita.training.callbacks.damage import DamageCallback
from megatron_vita.training.callbacks.folder import FolderCallback
from megatron_vita.training.callbacks.mlflow import MlflowCallback
from megatron_vita.training.callbacks.profiling import ProfileCallback
from megatron_vita.training.callbacks.recording import RecordCallback
from megatron_vita.training.callbacks.replicas import ReplicaCallback
from megatron_vita.training.callbacks.saving import SaveCallback
from megatron_vita.training.callbacks.slow_ranks import SlowRankCallback
from megatron_vita.training.callbacks.tensorboard import TensorBoardCallback
from megatron_vita.training.callbacks.validation import ValidationCallback
from megatron_vita.training.callbacks.wandb import WandbCallback
from megatron_vita.training.callbacks.watching import WatchCallback
from megatron_vita.training.metrics.pace import Pace
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_folder import RunLog


def build_hooks(run: Run, callbacks: Sequence[Callback] = (), *, log: RunLog) -> Hooks:
    """Assemble the callbacks of the run's folder, of the caller, and of the recipe's settings.

    In this order, metrics that the caller's callbacks record after a step are in its log, which
    precedes saving; validation, which may fail, follows saving.
    """
    hooks = Hooks(run, ())
    folder = run_folder(run.recipe)
    if folder is not None:
        hooks.callbacks.append(FolderCallback(folder, log))
    hooks.callbacks += callbacks
    hooks.callbacks += _writers(run)
    hooks.callbacks += _parts_of_the_loop(run, hooks)
    return hooks


def _writers(run: Run) -> Iterator[Callback]:
    training = run.recipe.training
    folder = run_folder(run.recipe)
    yield LogCallback(Pace(run.recipe))
    if training.tensorboard_dir:
        yield TensorBoardCallback(training.tensorboard_dir, step=run.step)
    if training.wandb_project:
        yield WandbCallback(training.wandb_project, name=training.wandb_exp_name, folder=folder)
    if training.mlflow_experiment:
        yield MlflowCallback(
            training.mlflow_experiment,
            tracking_uri=training.mlflow_tracking_uri,
            name=training.mlflow_run_name,
            folder=folder,
        )


def _parts_of_the_loop(run: Run, hooks: Hooks) -> Iterator[Callback]:
    recipe = run.recipe
    if recipe.training.hang_seconds:
        yield WatchCallback()
    if recipe.training.slow_rank_steps and dist.get_world_size() > 1:
        yield SlowRankCallback(
            steps=recipe.training.slow_rank_steps, factor=recipe.training.slow_rank_factor
        )
    saves = SaveCallback(run, hooks) if recipe.checkpoint.save else None
    if recipe.numerics.compare_weights_steps:
        yield _replicas(run, saves)
    yield RecordCallback(hooks)
    yield DamageCallback(run)
    if recipe.training.profile_step_start:
        yield ProfileCallback(recipe.training)
    if saves is not None:
        yield saves
    if run.validation_stream is not None:
        yield ValidationCallback(hooks)


def _replicas(run: Run, saves: SaveCallback | None) -> ReplicaCallback:
    steps = run.recipe.numerics.compare_weights_steps
    if saves is None:
        return ReplicaCallback(steps=steps)
    return ReplicaCallback(steps=steps, is_saved=saves.is_due)
