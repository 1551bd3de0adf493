"""Memory of gradients and optimizer state per parameter, by the recipe's types and devices.

| `optimizer` (with `training.bf16`) | gradient | device | host |
|---|---|---|---|
| plain | 4 | 12 | |
| use_precision_aware_optimizer, bf16 moments | 4 | 8 | |
| and bf16 gradients | 2 | 8 | |
| and store_param_remainders | 2 | 6 | |
| use_precision_aware_optimizer, optimizer_cpu_offload | 4 | 0 | 18 |

The weights take 2 more. Gradients are whole on each rank; a distributed optimizer divides the rest
over replicas and CP.
"""

from dataclasses import dataclass

from megatron_vita.config import OptimizerConfig, Recipe

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Bytes per trained parameter."""

    gradient: int
    state: float  # on the device
    temporary: float  # on the device, while the optimizer steps
    host: float


def optimizer_bytes(recipe: Recipe) -> OptimizerBytes:
    """Return the bytes per trained parameter, before a distributed optimizer divides them."""
    optimizer = recipe.optimizer
    bf16 = recipe.training.bf16
    gradient = _BYTES[optimizer.main_grads_dtype]
    if not optimizer.use_precision_aware_optimizer:
        state = 8  # two moments in fp32
        if bf16:
            state += 4  # fp32 weights beside the model's
        return OptimizerBytes(gradient=gradient, state=state, temporary=0, host=0)
    if optimizer.optimizer_cpu_offload:
        return _offloaded(optimizer, gradient)
    types = [optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype]
    weights = _BYTES[optimizer.main_params_dtype]
    if optimizer.store_param_remainders:
        weights = 2  # the lower half of each; the upper half is the model's own
    # Transformer Engine's kernel takes moments that are both in fp32 or both in bf16, and weights
    # in fp32; all others are copied to fp32 at once.
    copied = []
    if types != ["bf16", "bf16"]:
        copied = [kind for kind in types if kind != "fp32"]
    if optimizer.main_params_dtype != "fp32":
        copied.append(optimizer.main_params_dtype)
    return OptimizerBytes(
        gradient=gradient,
        state=weights + sum(_BYTES[kind] for kind in types),
        temporary=4 * len(copied),
        host=0,
    )


def _offloaded(optimizer: OptimizerConfig, gradient: int) -> OptimizerBytes:
    """Return the bytes per trained parameter with optimizer_cpu_offload.

    fp32 weights, gradients and two moments lie wherever a parameter is updated; on the host also
    the pinned bf16 copy that its weights came from. fp32 gradients on the device are the model's
    own.
    """
    offloaded = optimizer.optimizer_offload_fraction
    on_device = 12
    if gradient != 4:
        on_device += 4  # an fp32 copy of the gradient, which the model does not have
    return OptimizerBytes(
        gradient=gradient, state=(1 - offloaded) * on_device, temporary=0, host=offloaded * 18
    )


def optimizer_shards(recipe: Recipe, data_parallel: int) -> int:
    """Return the number of ranks over which a distributed optimizer divides its state."""
    parallel = recipe.parallel
    ranks = data_parallel * parallel.context_parallel_size
    if parallel.use_distributed_optimizer:
        return ranks
    return 1
