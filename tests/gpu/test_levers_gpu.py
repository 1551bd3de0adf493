"""On a GPU, with Transformer Engine's layers: memory levers change neither losses nor gradients, take
the memory that they say, and no step waits for the device before its end."""

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.data.batch import Batch
from megatron_vita.training.run.run import Run
from megatron_vita.training.step import step
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import open_layout
from tests.functional.synthetic import make_pack
from tests.gpu.fields import FA4, fa4_layouts

pytestmark = pytest.mark.skipif(
    not fa4_layouts(), reason="needs FlashAttention-4 and a GPU that is no older than Hopper"
)
LENGTH = 16384
LAYERS = 8
STATE = LENGTH * 512 * 2  # bytes of a hidden state
MODEL = FA4 | {
    "seq_length": LENGTH,
    "num_layers": LAYERS,
    "ffn_hidden_size": 4096,
    "global_batch_size": 2,
}
FULL = {"recompute_granularity": "full"}
KEPT = FULL | {"recompute_keep_attention_layers": -1}
PIECES = {"mlp_chunk_tokens": 1024}
OFFLOADED = {"activation_offload_fraction": 1.0}
PIXELS = {"recompute_vision": True, "recompute_vision_method": "tiles", "vision_tiles_at_once": 16}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
LEVERS = {
    "full": FULL,
    "kept": KEPT,
    "some kept": FULL | {"recompute_keep_attention_layers": 3, "recompute_num_layers": 6},
    "kept in pieces": KEPT | PIECES,
    "selective in pieces": SELECTIVE | PIECES,
    "from pixels": PIXELS,
    "all": KEPT | PIECES | PIXELS | OFFLOADED,
}


def packs(number: int) -> list[Batch]:
    """Packs of step `number`: documents of half and of a quarter of a pack; the rest is the tail."""
    lengths = [(LENGTH // 2, 100), (LENGTH // 4, 0)]
    return [make_pack(lengths, seed=2 * number + i, length=LENGTH) for i in (2, 3)]


def open_run(**fields: Any) -> Run:
    platform.initialize_process()
    gc.collect()
    torch.cuda.empty_cache()
    return open_layout(MODEL | fields, None)


def gradients(run: Run) -> Tensor:
    """Gradients of all parameters after a step, flat."""
    return torch.cat([p.main_grad.flatten() for p in run.unwrapped_model.parameters()])


def three_steps(**fields: Any) -> tuple[list[float], Tensor, Tensor]:
    """Losses; gradients of the first step; weights after the last."""
    run = open_run(**fields)
    first = torch.empty(0)
    losses = []
    for number in range(3):
        losses.append(train_step(run, iter(packs(number))).loss)
        first = first if number else gradients(run)
    return (
        losses,
        first,
        torch.cat([p.detach().flatten() for p in run.unwrapped_model.parameters()]),
    )


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], Tensor, Tensor]:
    return three_steps()


@pytest.mark.parametrize("fields", LEVERS.values(), ids=LEVERS)
def test_levers_change_losses_and_gradients_within_rounding(
    plain: tuple[list[float], Tensor, Tensor], fields: dict
) -> None:
    losses, first, weights = three_steps(**fields)
    assert losses == pytest.approx(plain[0], rel=2e-3)
    assert (first - plain[1]).norm() < 0.01 * plain[1].norm()
    assert (weights - plain[2]).float().norm() < 0.01 * plain[2].float().norm()


@pytest.mark.parametrize("fields", [FULL, KEPT | PIECES])
def test_waiting_on_the_host_changes_no_bit(fields: dict) -> None:
    here = three_steps(**fields)
    away = three_steps(**fields, **OFFLOADED)
    assert away[0] == here[0]
    assert torch.equal(away[1], here[1])
    assert torch.equal(away[2], here[2])


def peak(**fields: Any) -> float:
    """Peak memory of a step above what is allocated before it, in hidden states."""
    run = open_run(global_batch_size=1, **fields)
    train_step(run, iter(packs(0)[:1]))
    stands = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_step(run, iter(packs(1)[:1]))
    return (torch.cuda.max_memory_allocated() - stands) / STATE


def test_each_lever_takes_less_memory_than_the_one_before() -> None:
    everything = peak()
    kept = peak(**KEPT)
    in_pieces = peak(**KEPT, **PIECES)
    offloaded = peak(**KEPT, **PIECES, **OFFLOADED)
    inputs = peak(**FULL, **PIECES)
    assert everything - kept > 20 * (LAYERS - 2)  # a layer makes more than 30
    assert kept - in_pieces > 20  # fc1's output and its gradient, of all rows, are 16 each
    assert in_pieces - offloaded > 2 * (LAYERS - 3)  # two layers' are here at once
    assert 0.5 * LAYERS < in_pieces - inputs < 1.5 * LAYERS


def test_a_tower_that_goes_through_again_from_pixels_keeps_none_of_its_layers() -> None:
    shape = {"num_layers": 12, "hidden_size": 256, "ffn_hidden_size": 1024}
    by_layer = peak(vision=shape, **KEPT, recompute_vision=True, vision_tiles_at_once=16)
    from_pixels = peak(vision=shape, **KEPT, **PIXELS)
    assert from_pixels < by_layer


def test_host_buffers_are_pinned_and_nothing_grows() -> None:
    run = open_run(**KEPT, **PIECES, **OFFLOADED)
    buffers = run.unwrapped_model.language_model.decoder.layers[0].store.buffers
    assert all(buffer.is_pinned() for free in buffers._free.values() for buffer in free)
    found = []
    for number in range(20):
        train_step(run, iter(packs(number % 2)))
        found.append((buffers.count, torch.cuda.memory_allocated(), platform.memory_use().pinned))
    assert len(set(found[4:])) == 1


def waits_of(run: Run, number: int) -> list[str]:
    """Places at which forward and backward passes synchronize with the device."""
    places: list[str] = []
    schedule = step._run_schedule

    def watched(*args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                schedule(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places.extend(
            f"{warning.filename}:{warning.lineno}"
            for warning in caught
            if "synchron" in str(warning.message)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_run_schedule", watched)
        train_step(run, iter(packs(number)))
    return places


@pytest.mark.parametrize("fields", [{}, KEPT | PIECES | PIXELS | OFFLOADED], ids=["plain", "all"])
def test_forward_and_backward_passes_do_not_wait_for_the_device(fields: dict) -> None:
    run = open_run(**fields)
    for number in range(2):  # kernels are chosen, buffers made
        train_step(run, iter(packs(number)))
    assert waits_of(run, 2) == []


def test_products_added_to_main_gradients_are_the_gradients() -> None:
    """Transformer Engine adds weight gradients in the product; without that, they are rounded to
    bf16 and added by megatron-core."""
    run = open_run(**KEPT, **PIECES)
    fused = [
        m for m in run.unwrapped_model.modules() if getattr(m, "fuse_wgrad_accumulation", False)
    ]
    assert len(fused) == 4 * LAYERS
    train_step(run, iter(packs(0)))
    found = gradients(run)
    other = open_run(**KEPT, **PIECES)
    for module in other.unwrapped_model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = False
    train_step(other, iter(packs(0)))
    expected = gradients(other)
    assert (found - expected).norm() < 0.01 * expected.norm()
