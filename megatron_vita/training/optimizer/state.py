"""State of megatron-core's optimizers in checkpoints that any layout can read."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megatron_vita.checkpoint import store
from megatron_vita.config import Recipe
from megatron_vita.costs.memory.parameters import stage_parameters
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.platform.remainders import (
    has_param_remainders,
    save_remainders_as_fp32,
    split_weights,
)
from megatron_vita.platform.saving import without_collection
from megatron_vita.training.optimizer.optimizer import special_rates
from megatron_vita.training.optimizer.shards import owned_shards

save_remainders_as_fp32()


def check_state_can_be_saved(recipe: Recipe) -> None:
    """Check that megatron-core can save the optimizer's state.

    With torch's Adam it takes the number of steps from a rank's state, and stages that train
    nothing have none.

    Raises:
        ConfigError: it cannot.
    """
    stages = recipe.parallel.pipeline_model_parallel_size
    sharded = recipe.parallel.use_distributed_optimizer and not HAVE_APEX_OR_TE
    idle = any(stage_parameters(recipe, s).trainable(recipe) == 0 for s in range(stages))
    if recipe.checkpoint.save and sharded and idle:
        raise ConfigError(
            f"parallel.use_distributed_optimizer is true with pipeline_model_parallel_size {stages} and "
            "training.freeze_language_model: without Transformer Engine or apex the state of stages that train nothing "
            "cannot be saved; set use_distributed_optimizer to false, which costs little where little is trained"
        )


def sharded_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, loading: bool) -> Any:
    """Return an optimizer's sharded state beside the `model`'s, to be saved or to be filled."""
    if loading:
        _allocate_adam_state(optimizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_collection())
        for part in _of_sharded(optimizer):
            stack.enter_context(owned_shards(part))
        state = optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=store.sharding_metadata()
        )
    # Fields of the offloading optimizer would keep others from loading the state.
    for hybrid in _of_kind(optimizer, HybridDeviceOptimizer):
        _leave_out(_own_fields(hybrid), state)
    return state


def _allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Allocate the state of torch's Adam before the first step, so that a checkpoint can fill it.

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
    optimizer: MegatronOptimizer,
    chunks: list[DistributedDataParallel],
    state: dict[str, Any],
    *,
    saved: Recipe,
    recipe: Recipe,
) -> None:
    """Load the state saved by a run of recipe `saved`. Collective.

    The weights of `chunks` must be loaded before. Types of the state may differ: it is saved in
    fp32 whatever they are.

    Raises:
        CheckpointError: on all ranks, if a distributed optimizer's weights do not round to the
            model's.
    """
    # The model's weights were loaded from their own part of the checkpoint: two sources that must
    # agree. A copy where loading the optimizer overwrites them.
    shards = list(_shards(optimizer, chunks))
    kept = []
    for shard in shards:
        if shard.is_written_to:
            kept.append(shard.model.clone())
        else:
            kept.append(shard.model)
    _load(optimizer, state, saved=saved, recipe=recipe)
    rough = "fp16" in (saved.optimizer.main_params_dtype, recipe.optimizer.main_params_dtype)
    wrong = [
        shard.name
        for shard, weights in zip(shards, kept, strict=True)
        if not _agree(shard.main.to(weights.device), weights, rough=rough)
    ]
    _refuse(
        wrong,
        "the optimizer's weights are not those of the model: its state was written wrongly; "
        "checkpoint.load starts a run from the model's weights alone",
    )
    # Upper halves may have been rounded the other way, on the ranks that own them alone.
    if recipe.optimizer.store_param_remainders:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shard:
    """One rank's shard of a parameter in a distributed optimizer."""

    name: str
    model: torch.Tensor  # the model's, in its type
    parameter: torch.nn.Parameter
    optimizer: DistributedOptimizer

    @property
    def main(self) -> torch.Tensor:
        """fp32 weights, computed on access where the optimizer stores them otherwise."""
        states = self.optimizer._get_main_param_and_optimizer_states(self.parameter)
        return states["param"].detach()

    @property
    def is_written_to(self) -> bool:
        """True if loading the optimizer's weights overwrites the model's."""
        return self.model.dtype == torch.float32 or has_param_remainders(self.optimizer)


def _agree(main: torch.Tensor, weights: torch.Tensor, *, rough: bool) -> bool:
    """Tell whether `weights` are `main` rounded to their type.

    torch rounds halves to even, Transformer Engine's remainders away from zero. `rough`: main
    weights have been in fp16, and may now round to a neighbour.
    """
    nearest = main.to(weights.dtype)
    if torch.equal(nearest, weights):
        return True
    if weights.dtype != torch.bfloat16:
        return False
    if rough:
        # Half a step of bf16 and one of fp16, or of fp16's smallest numbers.
        allowed = weights.float().abs() * (2**-8 + 2**-11) + main.abs().max() * 2**-38
        return bool(((main - weights.float()).abs() <= allowed).all())
    away, _ = split_weights(main)
    return bool(((weights == nearest) | (weights == away)).all())


def _shards(
    optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel]
) -> Iterator[_Shard]:
    """Yield this rank's shards.

    A replicated optimizer has none, nor has a stage that trains nothing.
    """
    names = {p: name for chunk in chunks for name, p in chunk.module.named_parameters()}
    parts = _of_sharded(optimizer)
    assert len(parts) <= 1, "one optimizer has all parameters"
    for part in (part for part in parts if not part.is_stub_optimizer):
        whole = itertools.chain(*part.model_float16_groups, *part.model_fp32_groups)
        for p in whole:
            found = part._get_model_param_range_map(p)["param"]
            span = slice(found.start, found.end)
            model = p.detach().view(-1)[span]
            yield _Shard(
                name=names[p],
                model=model,
                parameter=p,
                optimizer=part,
            )


def _refuse(names: list[str], reason: str) -> None:
    """Raise CheckpointError on all ranks if any has names. Collective."""
    # On all ranks: others would wait for one that raised alone.
    of_ranks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, names)
    if found := sorted({name for names in of_ranks for name in names}):
        raise CheckpointError(f"{reason} ({len(found)} parameters, the first {found[0]})")


def _load(
    optimizer: MegatronOptimizer, state: dict[str, Any], *, saved: Recipe, recipe: Recipe
) -> None:
    """Load an optimizer's state, with the learning rates and Adam's constants of `recipe`.

    megatron-core identifies parameter groups by their rates, so those in the state are replaced
    first. It gives one `step` tensor to all parameters of torch's Adam, which would then count once
    for each.
    """
    # By pairs of rates, in the same order for both recipes: `check_parts` made sure that the kinds
    # of groups are the same.
    pairs = list(zip(_rates(saved), _rates(recipe), strict=True))
    rates = dict(pairs)
    for then, now in pairs:
        if rates[then] != now:
            raise CheckpointError(
                f"kinds of parameters that had one learning rate, {then[0]:g}, in the run to be resumed "
                f"would have {rates[then][0]:g} and {now[0]:g}, which its state cannot tell apart: keep "
                "lora.lr and the multipliers of learning rates, or start another run from its weights"
            )
    for group in _saved_groups(state):
        group["max_lr"], group["min_lr"] = rates[group["max_lr"], group["min_lr"]]
        group["betas"] = (recipe.optimizer.adam_beta1, recipe.optimizer.adam_beta2)
        group["eps"] = recipe.optimizer.adam_eps
        for hybrid in _of_kind(optimizer, HybridDeviceOptimizer):
            group |= {name: hybrid.defaults[name] for name in _own_fields(hybrid)}
    with contextlib.ExitStack() as stack:
        for part in _of_sharded(optimizer):
            stack.enter_context(owned_shards(part))
        optimizer.load_state_dict(state)
    for inner in _torch_adams(optimizer):
        for values in inner.state.values():
            values["step"] = values["step"].clone()


def _rates(recipe: Recipe) -> list[tuple[float, float]]:
    """Return highest and lowest rate of each kind of group, in an order independent of their
    values."""
    others = [(rate["max_lr"], rate["min_lr"]) for rate in special_rates(recipe).values()]
    return [(recipe.optimizer.lr, recipe.optimizer.min_lr), *others]


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups in the state of one or several optimizers."""
    if isinstance(state, dict):
        yield from state.get("param_groups", [])
        for value in state.values():
            yield from _saved_groups(value)


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return _of_kind(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _of_sharded(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Return the distributed optimizers, of which each rank owns ranges of the parameters."""
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _of_kind(optimizer: MegatronOptimizer, kind: Any) -> list[Any]:
    """Return the optimizers of a kind that megatron-core has wrapped."""
    inner = [part.optimizer for part in _parts(optimizer)]
    return [part for part in inner if isinstance(part, kind)]


def _own_fields(hybrid: HybridDeviceOptimizer) -> set[str]:
    """Return the group fields that only a hybrid optimizer has: device and inner optimizer."""
    return hybrid.defaults.keys() - {"lr", "weight_decay", "betas", "eps", "bias_correction"}


def _leave_out(names: set[str], state: Any) -> None:
    """Remove fields from all parameter groups in an optimizer's state."""
    for group in _saved_groups(state):
        for name in names & group.keys():
            del group[name]


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
