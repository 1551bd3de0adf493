"""FlashAttention-4 computes long parts of prompts only where its results are those of torch."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.inference.runner import partial_attention
from megatron_vita.inference.runner.partial_attention import attend, has_fa4

SHAPE = {"heads": 4, "query_groups": 2, "width": 64, "dtype": torch.bfloat16}


class StandIn:
    """Computes what the kernels do, times a factor."""

    def __init__(self) -> None:
        self.out_factor = 1.0
        self.lse_factor = 1.0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool,
        return_lse: bool,
        pack_gqa: bool,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        assert not pack_gqa
        key, value = (x[0].transpose(0, 1) for x in (key, value))
        out, lse = attend(query[0], key, value, causal=causal)
        return out[None] * self.out_factor, lse.T[None] * self.lse_factor


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = stand_in.forward  # type: ignore[attr-defined]
    module._flash_attn_bwd = None  # type: ignore[attr-defined]
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    monkeypatch.delitem(sys.modules, "megatron_vita.model.backends.fa4", raising=False)
    monkeypatch.setattr(platform, "has_flash_attention_4", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    has_fa4.cache_clear()
    yield stand_in
    has_fa4.cache_clear()
    sys.modules.pop("megatron_vita.model.backends.fa4", None)


def test_right_kernels_are_used(kernels: StandIn) -> None:
    assert has_fa4(**SHAPE)


@pytest.mark.parametrize("factor", ["out_factor", "lse_factor"])
def test_wrong_kernels_are_not_used_and_named(
    kernels: StandIn, factor: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(kernels, factor, 1.1)
    assert not has_fa4(**SHAPE)
    name = {"out_factor": "output", "lse_factor": "log-sum-exp"}[factor]
    assert f"its {name} differs from torch's attention by 10" in caplog.text


def test_kernels_that_cannot_be_imported_are_not_used_and_named(
    kernels: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    del sys.modules["flash_attn.cute.interface"]._flash_attn_bwd
    assert not has_fa4(**SHAPE)
    assert "ImportError: cannot import name '_flash_attn_bwd'" in caplog.text


@pytest.mark.parametrize(
    "changed", [{"width": 80}, {"dtype": torch.float32}, {"dtype": torch.float16}], ids=str
)
def test_shapes_that_the_kernels_cannot_have_are_left_to_torch(
    kernels: StandIn, changed: dict
) -> None:
    assert not has_fa4(**SHAPE | changed)


def test_older_gpus_are_left_to_torch(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert not has_fa4(**SHAPE)


@pytest.mark.parametrize("causal", [False, True])
def test_parts_over_the_kernels_are_those_of_torch(kernels: StandIn, causal: bool) -> None:
    from megatron_vita.model.backends.fa4 import attend_part

    query = torch.randn(48, 4, 64, dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 48, 64, dtype=torch.bfloat16)
    out, lse = attend_part(query, key, value, causal=causal)
    expected, sums = partial_attention.attend(query, key, value, causal=causal)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.T, sums)
