"""Replacements for CUDA calls with which megatron-core 0.19.2 runs on a CPU.

megatron-core calls CUDA unconditionally: for the current device, for buffers, streams and random
states. Each such entry point of torch is replaced by its CPU counterpart. Plain wrappers are used
and not a TorchFunctionMode, because a mode is not active inside autograd's backward pass, where
recomputed activations need it. `torch.cuda.is_available` stays false. Nothing here is ever active
on a machine with CUDA.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
)
_METRIC_WRITERS = ("torch.utils.tensorboard", "wandb")


class _Stream:
    """A no-op CUDA stream: on the CPU everything runs in program order."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    """A no-op CUDA event: on the CPU everything runs in program order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


_STREAM = _Stream()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return getattr(device, "type", None) == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory so that CUDA means CPU and pinned memory means ordinary memory."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Tensor.to` so that CUDA devices mean CPU."""

    @functools.wraps(to)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    return wrapper


def _cuda_type_names(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Tensor.type` to return CUDA type names to megatron-core, and to no other caller."""

    @functools.wraps(type_of)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_of(self, *args, **kwargs)
        # Only for megatron-core: torch and other libraries must see the true type.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(name, str) and caller.startswith("megatron.core"):
            return name.replace("torch.", "torch.cuda.")
        return name

    return wrapper


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _torch_patches() -> list[tuple[Any, str, Any]]:
    """List (owner, attribute, replacement), grouped by the reason megatron-core needs it."""
    cuda = torch.cuda
    # the current device: rotary positions, collectives, pipeline messages, gradient buffers
    device = [
        (cuda, "current_device", lambda: CPU),
        (cuda, "device_count", lambda: 1),
        (cuda, "set_device", _nothing),
    ]
    # synchronization, and the side streams of overlapped communication and of checkpointing
    order = [
        (cuda, "synchronize", _nothing),
        (cuda, "empty_cache", _nothing),
        (cuda, "current_stream", lambda *_, **__: _STREAM),
        (cuda, "default_stream", lambda *_, **__: _STREAM),
        (cuda, "stream", lambda _: contextlib.nullcontext()),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Event),
        (torch.Tensor, "record_stream", _nothing),
    ]
    random = [  # the tensor-parallel random state tracker
        (cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (cuda, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        (cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed)),
    ]
    # buffers made with device="cuda" or moved there: schedules, masks, clipping, the optimizer
    placement = [
        *((torch, name, _on_cpu(getattr(torch, name))) for name in _FACTORIES),
        (torch.Tensor, "to", _to_cpu(torch.Tensor.to)),
        (torch.Tensor, "cuda", _itself),
        (torch.Tensor, "pin_memory", _itself),
        (torch.nn.Module, "cuda", _itself),
    ]
    # clip_grads.py and distrib_optimizer.py compare type names with "torch.cuda.FloatTensor"
    names = [
        (torch.Tensor, "type", _cuda_type_names(torch.Tensor.type)),
    ]
    return device + order + random + placement + names


def _megatron_patches() -> list[tuple[Any, str, Any]]:
    """List patches of megatron-core itself, whose import needs an adapted torch."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        """Add the `step` that torch's Adam keeps: fused Adam has none, so the sharded state lacks
        it."""
        with torch.no_grad():
            return set_states(self, model_param, {"step": None, **tensors})

    return [
        # the tracker of random states asks torch._C for CUDA generators
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        # resuming the distributed optimizer with torch's Adam
        (DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_with_step),
    ]


def _not_compiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Stand in for `torch.compile`, as a decorator with or without options: compile nothing."""
    return function or _not_compiled


@contextlib.contextmanager
def _light_import() -> Iterator[None]:
    """Keep megatron-core from importing packages that nothing uses here, for the time of a block.

    It passes its fused operations to `torch.compile`, which imports the compiler at once, and
    imports two writers of metrics for its timers; together more than half of its import.
    """
    hidden = [name for name in _METRIC_WRITERS if name not in sys.modules]
    compile_ = torch.compile
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: cannot be imported
    torch.compile = _not_compiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
        for name in hidden:
            del sys.modules[name]


def adapt_to_cpu() -> Callable[[], None]:
    """Adapt torch, then megatron-core, to a machine without CUDA; return a function that undoes
    all."""
    assert not torch.cuda.is_available(), "never on a machine with CUDA"
    # torch caches the factories that `with torch.device(...)` recognizes: fill the cache before
    # they are replaced, else that context would no longer apply to them.
    _device_constructors()
    undo = contextlib.ExitStack()
    for patches in (_torch_patches, _megatron_patches):
        with _light_import():
            found = patches()
        for owner, name, replacement in found:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
    return undo.close
