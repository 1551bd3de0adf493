"""On a GPU: 4-bit maps in the layers of every backend compute what their values in bf16 compute, and
take the memory that they say."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.model.lora import adapters_of
from megatron_vita.model.quantized import packed_tensors, quantized_linears
from megatron_vita.training.run.run import Run
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import my_batches, open_layout
from tests.functional.synthetic import QUANTIZED
from tests.gpu.fields import FA4, GPUS, TE, TORCH, fa4_layouts

pytestmark = pytest.mark.skipif(
    not GPUS or not platform.has_bitsandbytes(), reason="needs a GPU and bitsandbytes"
)
BACKENDS = {"torch": TORCH}
if GPUS and platform.has_transformer_engine():
    BACKENDS["te"] = TE
if fa4_layouts():
    BACKENDS["fa4"] = FA4
PACKED = QUANTIZED | {"quantize_block_size": 64, "double_quant": True}
DENSE = {"quantize_base": "none", "quantize_block_size": 64, "double_quant": False}
LARGE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "kv_channels": 128,
    "ffn_hidden_size": 8192,
    "num_layers": 12,
    "init_method_std": 0.02,
}
LAYER = 2 * 2048 * (4 * 2048 + 3 * 8192)  # bytes of a layer's maps in bf16
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_keep_attention_layers": -1,
    "mlp_chunk_tokens": 48,
}


def open_run(**fields: Any) -> Run:
    platform.initialize_process()
    gc.collect()
    torch.cuda.empty_cache()
    run = open_layout(PACKED | fields, None)
    generator = torch.Generator("cuda").manual_seed(3)
    with torch.no_grad():
        for _, adapter in adapters_of(run.unwrapped_model):
            adapter.b.normal_(std=0.05, generator=generator)
    run.optimizer.reload_model_params()
    return run


def first_step(run: Run) -> tuple[float, Tensor]:
    """The loss, and the gradients of all adapters, flat."""
    metrics = train_step(run, iter(my_batches(run, 0)))
    parts = [
        vars(parameter)["main_grad"].float().flatten()
        for _, adapter in adapters_of(run.unwrapped_model)
        for parameter in adapter.parameters()
    ]
    return metrics.loss, torch.cat(parts)


@pytest.mark.parametrize("levers", [{}, RECOMPUTED], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_equals_that_of_the_same_values_in_bf16(backend: str, levers: dict) -> None:
    fields = BACKENDS[backend] | levers
    packed = open_run(**fields)
    values = {
        f"{name}.weight": linear.packed.dense()
        for name, linear in quantized_linears(packed.unwrapped_model)
        if linear.packed is not None
    }
    assert len(values) == 16
    loss, gradients = first_step(packed)
    dense = open_run(**fields, **DENSE)
    with torch.no_grad():
        for name, value in values.items():
            dense.unwrapped_model.get_parameter(name).copy_(value)
    expected, theirs = first_step(dense)
    assert loss == pytest.approx(expected, rel=2e-3)
    assert torch.cosine_similarity(gradients, theirs, dim=0) > 0.999
    assert gradients.norm().item() == pytest.approx(theirs.norm().item(), rel=2e-2)


def test_a_model_is_built_and_trained_without_room_for_its_weights_in_bf16() -> None:
    fields = BACKENDS.get("te", TORCH) | LARGE
    platform.initialize_process()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = open_run(**fields)
    built = torch.cuda.max_memory_allocated() - before
    packed = sum(tensor.nbytes for _, tensor in packed_tensors(run.unwrapped_model))
    # 4 bits, 8 bits for each block of 64, and less than 0.01 for what blocks share.
    assert packed == pytest.approx(12 * LAYER / 2 * (4 + 8 / 64) / 8, rel=1e-2)
    rest = sum(parameter.nbytes for parameter in run.unwrapped_model.parameters())
    # While the last layer is initialized: its maps, and a block of random numbers in fp32.
    assert built < packed + 4 * rest + LAYER + (200 << 20)
    assert built < 12 * LAYER / 2
    torch.cuda.reset_peak_memory_stats()
    train_step(run, iter(my_batches(run, 0)))
    assert torch.cuda.max_memory_allocated() - before < 12 * LAYER / 2


def bytes_kept_by_layers(**fields: Any) -> int:
    """Memory that all layers but the first keep of the first pack."""
    run = open_run(**fields)
    seen: list[int] = []
    layers = run.unwrapped_model.language_model.decoder.layers
    for layer in (layers[0], layers[-1]):
        layer.register_forward_hook(lambda *_: seen.append(torch.cuda.memory_allocated()))
    train_step(run, iter(my_batches(run, 0)))
    return seen[1] - seen[0]


def test_activations_kept_for_backward_are_those_of_weights_in_bf16() -> None:
    fields = BACKENDS.get("te", TORCH) | LARGE
    assert bytes_kept_by_layers(**fields) <= 1.05 * bytes_kept_by_layers(**fields, **DENSE)
