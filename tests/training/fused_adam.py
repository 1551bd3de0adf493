"""Transformer Engine's Adam without its GPU: the same types of state, the same interface to
megatron-core, in plain torch.

`installed` puts it where megatron-core looks for Transformer Engine's.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as core
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from torch import Tensor

STATES = ("exp_avg", "exp_avg_sq", "master_param")


def numpy_join(upper: Tensor, lower: Tensor) -> Tensor:
    """fp32 from bf16 and int16 by their bytes, as the kernel does it."""
    high = upper.view(torch.int16).numpy().copy()
    low = lower.numpy()
    high[low < 0] -= 1
    words = high.astype("<u2").astype("<u4") << 16 | low.view("<u2").astype("<u4")
    return torch.from_numpy(words.view("<f4"))


def numpy_split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 and int16 from fp32 by their bytes."""
    words = weights.contiguous().numpy().view("<u4")
    low = (words & 0xFFFF).astype("<u2").view("<i2")
    high = (words >> 16).astype("<u2").view("<i2")
    high = high + (low < 0).astype("<i2")
    return torch.from_numpy(high.astype("<i2")).view(torch.bfloat16), torch.from_numpy(low.copy())


class FusedAdam(torch.optim.Optimizer):
    """AdamW; states are fp32, bf16, or fp16 (in uint8's place too) with a scale."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self.types = dict(
            zip(STATES, (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype), strict=True)
        )
        self.scales: dict[tuple[int, str], float] = {}

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        for name in STATES[:2]:
            self.set_scaled_state(param, name, torch.zeros_like(param, dtype=torch.float32))
        if not self.master_weights:
            return
        weights = param.detach().float()
        whole = numpy_split(weights)[1] if store_param_remainders else weights
        self.set_scaled_state(param, "master_param", whole)

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        state = self.state[param][name]
        if state.dtype in (torch.int16, torch.float32):
            return state
        return state.float() * self.scales.get((id(param), name), 1.0)

    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        kind = self.types[name]
        if self.store_param_remainders and name == "master_param":
            assert value.dtype == torch.int16
            self.state[param][name] = value.clone()
            return
        assert value.dtype == torch.float32
        if kind in (torch.float16, torch.uint8):
            scale = max(value.abs().max().item() / 30000, 1e-30)
            self.scales[id(param), name] = scale
            self.state[param][name] = (value / scale).half()
        else:
            self.state[param][name] = value.to(kind).clone()

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()
        order = [p for group in self.param_groups for p in group["params"]]
        whole["state"] = {
            i: {name: self.get_unscaled_state(order[i], name) for name in values}
            for i, values in whole["state"].items()
        }
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for i, values in state_dict["state"].items():
            self.state[order[i]] = {}
            for name, value in values.items():
                remainder = self.store_param_remainders and name == "master_param"
                self.set_scaled_state(order[i], name, value if remainder else value.float())

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, self.store_param_remainders)
                grad = param.decoupled_grad if self.use_decoupled_grad else param.grad
                if grad is not None:
                    self._update(param, grad.float(), group)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2) = group["betas"]
        step = group["step"]
        mean, variance = (self.get_unscaled_state(param, name) for name in STATES[:2])
        mean = beta1 * mean + (1 - beta1) * grad
        variance = beta2 * variance + (1 - beta2) * grad * grad
        weights = self._weights(param)
        denominator = (variance / (1 - beta2**step)).sqrt() + group["eps"]
        update = mean / (1 - beta1**step) / denominator + group["weight_decay"] * weights
        weights = weights - group["lr"] * update
        self.set_scaled_state(param, "exp_avg", mean)
        self.set_scaled_state(param, "exp_avg_sq", variance)
        if self.store_param_remainders:
            upper, lower = numpy_split(weights)
            param.copy_(upper)
            self.set_scaled_state(param, "master_param", lower)
            return
        param.copy_(weights)
        if self.master_weights:
            self.set_scaled_state(param, "master_param", weights)

    def _weights(self, param: Tensor) -> Tensor:
        if not self.master_weights:
            return param.detach().float()
        if self.store_param_remainders:
            return numpy_join(param.detach(), self.state[param]["master_param"])
        return self.get_unscaled_state(param, "master_param")


@contextmanager
def installed() -> Iterator[None]:
    """megatron-core takes this Adam for Transformer Engine's."""
    engine = ModuleType("transformer_engine.pytorch.optimizers")
    vars(engine)["FusedAdam"] = FusedAdam
    with (
        mock.patch.dict(sys.modules, {engine.__name__: engine}),
        mock.patch.object(core, "Adam", FusedAdam),
        mock.patch.object(core, "USING_PYTORCH_OPTIMIZER", False),
        mock.patch.object(core, "is_te_min_version", return_value=True),
        mock.patch.object(optimizer_config, "is_te_min_version", return_value=True),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
        mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ):
        yield
