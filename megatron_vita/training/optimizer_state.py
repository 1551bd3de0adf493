"""The state of megatron-core's optimizers in a checkpoint that any layout can read."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer as Buffer
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

from megatron_vita.checkpoint import store
from megatron_vita.config import Recipe
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.model.vita import VitaModel
from megatron_vita.training.optimizer import vision_rates


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


def sharded_state(
    optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel], model: dict[str, Any], *, loading: bool
) -> Any:
    """The sharded state of an optimizer beside that of the `model`, to be written or to be filled. Collective."""
    if loading:
        _allocate_adam_state(optimizer)
    with contextlib.ExitStack() as stack:
        for buffer in (buffer for chunk in chunks for buffer in chunk.buffers):
            stack.enter_context(_places_without_padding(buffer))
        return optimizer.sharded_state_dict(model, is_loading=loading, metadata=store.sharding_metadata())


@contextlib.contextmanager
def _places_without_padding(buffer: Buffer) -> Iterator[None]:
    """Has each parameter's place in `buffer` counted without what pads the buckets before its own.

    megatron-core gathers the buckets of a distributed optimizer one after the other without their padding, and looks
    for parameters there at their places in the padded buffer (0.19.2): all after the first padding would be written
    with their neighbours' values.
    """
    padded = buffer.param_index_map
    starts, start = [], 0
    for bucket in buffer.buckets:
        starts.append(start - bucket.offset)
        start += bucket.numel_unpadded
    buffer.param_index_map = {
        p: (first + starts[bucket], last + starts[bucket], bucket) for p, (first, last, bucket) in padded.items()
    }
    try:
        yield
    finally:
        buffer.param_index_map = padded


def _allocate_adam_state(optimizer: MegatronOptimizer) -> None:
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


def load(
    optimizer: MegatronOptimizer, state: dict[str, Any], models: list[VitaModel], *, saved: Recipe, recipe: Recipe
) -> None:
    """Loads the state of a run of recipe `saved` beside the weights of `models`, which must be loaded. Collective.

    CheckpointError, on all ranks, unless the weights that the optimizer keeps round to those of the models.
    """
    trained = [(name, p) for model in models for name, p in model.named_parameters() if p.requires_grad]
    weights = [p.detach().clone() for _, p in trained]
    _load(optimizer, state, saved=saved, recipe=recipe)
    for part in _parts(optimizer):
        if hasattr(part, "_copy_main_params_to_model_params"):  # none where they are the model's own
            part._copy_main_params_to_model_params()
    wrong = [name for (name, p), weight in zip(trained, weights, strict=True) if not torch.equal(p, weight)]
    of_ranks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, wrong)
    if found := sorted({name for names in of_ranks for name in names}):
        raise CheckpointError(
            f"the optimizer's weights are not those of the model in {len(found)} parameters, the first {found[0]}: its "
            "state was written wrongly; checkpoint.load starts a run from the model's weights alone"
        )


def _load(optimizer: MegatronOptimizer, state: dict[str, Any], *, saved: Recipe, recipe: Recipe) -> None:
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
    inner = [part.optimizer for part in _parts(optimizer)]
    return [part for part in inner if isinstance(part, torch.optim.Adam | torch.optim.AdamW)]


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
