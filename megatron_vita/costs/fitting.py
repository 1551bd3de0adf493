"""Search for the memory levers that fit the available memory and make steps fastest.

A pure function of recipe, available memory and layout, so that all ranks choose alike.
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_vita.config import Recipe
from megatron_vita.costs.changes import Changes
from megatron_vita.costs.devices import H100, Device
from megatron_vita.costs.memory.host_memory import host_memory
from megatron_vita.costs.memory.layer_memory import LayerPlan, layer_tensors
from megatron_vita.costs.memory.memory import GIB, full_pack, rank_memory
from megatron_vita.costs.step_time import step_time
from megatron_vita.rounding import ceil_div

LEVERS = (
    "training.recompute_granularity",
    "training.recompute_method",
    "training.recompute_num_layers",
    "training.recompute_modules",
    "training.recompute_keep_attention_layers",
    "training.mlp_chunk_tokens",
    "training.activation_offload_fraction",
    "training.recompute_vision",
    "training.recompute_vision_method",
    "training.vision_tiles_at_once",
)
"""Fields that are chosen. `activation_offload_gib` is a limit, and stays as given."""
NO_LEVERS: Changes = {
    "training.fit_memory": False,
    "training.recompute_granularity": "none",
    "training.recompute_method": "block",
    "training.recompute_num_layers": 0,
    "training.recompute_modules": ["core_attn"],
    "training.recompute_keep_attention_layers": 0,
    "training.mlp_chunk_tokens": 0,
    "training.activation_offload_fraction": 0.0,
    "training.activation_offload_gib": 0.0,
}
"""Settings with which layers of the language model keep everything."""
LEAN: Changes = {
    "optimizer.use_precision_aware_optimizer": True,
    "optimizer.exp_avg_dtype": "bf16",
    "optimizer.exp_avg_sq_dtype": "bf16",
    "optimizer.store_param_remainders": True,
}
"""Settings with which a parameter takes 12 bytes instead of 18."""
LEANEST: Changes = LEAN | {
    "optimizer.main_grads_dtype": "bf16",
    "optimizer.reduce_scatter_with_fp32_accumulation": True,
}
"""Settings with which a parameter takes 10 bytes."""
CHUNKS = (131072, 65536, 32768, 16384, 8192)
"""Sizes of an MLP's piece in tokens, largest first; smaller ones would leave matrix units idle."""
TILES_AT_ONCE = 8
"""Most tiles encoded at a time where a tower is recomputed from pixels."""
MARGIN = 0.03
"""Fraction of the device that is left free: estimates are within 5 %, most within 2."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory available to a rank, in bytes."""

    device: int
    host: int
    pinned: int = 0  # part of `host` that activations may take; 0: all of it


@dataclass(frozen=True, kw_only=True)
class Need:
    """Peak memory of a rank, in bytes."""

    device: int
    host: int
    pinned: int = 0

    def fits(self, room: Room) -> bool:
        """Tell whether device, host and pinned memory suffice."""
        pinned = room.pinned or room.host
        return self.fits_device(room) and self.host <= room.host and self.pinned <= pinned

    def fits_device(self, room: Room) -> bool:
        """Tell whether the device's memory suffices, with a margin."""
        return self.device <= room.device * (1 - MARGIN)

    def describe(self) -> str:
        """Format device and host memory in GiB."""
        return f"{self.device / GIB:.1f} GiB of its device and {self.host / GIB:.1f} of its host"


def memory_need(recipe: Recipe, *, data_parallel: int) -> Need:
    """Estimate the peak memory of the fullest rank, for packs full of tiles."""
    load = full_pack(recipe)
    stages = _telling_stages(recipe)
    devices = [rank_memory(recipe, s, data_parallel=data_parallel, load=load) for s in stages]
    hosts = [host_memory(recipe, s, data_parallel=data_parallel, load=load) for s in stages]
    return Need(
        device=max(memory.device for memory in devices),
        host=max(host.total for host in hosts),
        pinned=max(host.activations for host in hosts),
    )


def fit_memory(
    recipe: Recipe, room: Room, *, data_parallel: int, device: Device | None = None
) -> Recipe | None:
    """Return the recipe with the fastest levers that fit; None if none fit.

    Args:
        recipe: the recipe, whose own levers are replaced.
        room: memory available to a rank.
        data_parallel: number of replicas.
        device: its rates decide which levers are fastest; an H100 if None.
    """
    search = _Search(recipe, room, data_parallel=data_parallel)
    load = full_pack(recipe)
    rates = device or H100
    fitting = list(search.candidates())
    if not fitting:
        return None

    def cost(candidate: Recipe) -> tuple[float, int]:
        time = step_time(candidate, rates, data_parallel=data_parallel, load=load)
        # Differences below 0.1 ms are noise: of equally fast candidates, the one that pins less.
        return round(time.total, 4), search.need(candidate).host

    return min(fitting, key=cost)


def smallest(recipe: Recipe) -> Recipe:
    """Return the recipe with the levers that need least device memory, whatever the host's."""
    return recipe.replaced(
        _vision_choices(recipe)[-1] | _layers(recipe, kept=0, sent=_count(recipe))
    )


def leaner_optimizers(recipe: Recipe) -> list[Recipe]:
    """Return the recipe with less optimizer state on the device, smallest last.

    Empty if the optimizer cannot be changed so. They round differently, so a run never chooses one
    unasked.
    """
    sharded = recipe.parallel.use_distributed_optimizer
    optimizer = recipe.optimizer
    if not (recipe.training.bf16 and sharded) or optimizer.use_precision_aware_optimizer:
        return []
    return [recipe.replaced(LEAN), recipe.replaced(LEANEST)]


class _Search:
    """Search for the best fitting candidate of each kind."""

    def __init__(self, recipe: Recipe, room: Room, *, data_parallel: int) -> None:
        self.recipe = recipe
        self.room = room
        self.data_parallel = data_parallel

    def need(self, candidate: Recipe) -> Need:
        return memory_need(candidate, data_parallel=self.data_parallel)

    def candidates(self) -> Iterator[Recipe]:
        """Yield, for each way of recomputing the tower, the best of each way of recomputing
        layers."""
        # Most layouts that are too large are so with any levers: they cost one estimate.
        if not self.need(smallest(self.recipe)).fits_device(self.room):
            return
        for vision in _vision_choices(self.recipe):
            yield from self._of_layers(vision)

    def _of_layers(self, vision: Changes) -> Iterator[Recipe]:
        # Everything kept: whatever recomputes more is slower.
        if self._fits(NO_LEVERS | vision):
            yield self.recipe.replaced(NO_LEVERS | vision)
            return
        mlp = _mlp(self.recipe)
        # megatron-core's recomputation, of the whole MLP at once, draws no masks again.
        possible = mlp["training.mlp_chunk_tokens"] or not self.recipe.lora.dropout
        if possible and self._fits(mlp | vision):
            yield self.recipe.replaced(mlp | vision)
        count = _count(self.recipe)
        for offload in (False, True):
            number = self._least_recomputed(vision, offload=offload)
            if number is not None:
                yield self.recipe.replaced(self._some(number, offload) | vision)
        # All layers recomputed: as many as fit keep attention, and as few as possible are
        # offloaded. Memory grows with each layer that keeps attention, so bisection finds the
        # number.
        without = _first(0, count, lambda n: self._least_sent(vision, kept=count - n) is not None)
        if without is not None:
            found = self._least_sent(vision, kept=count - without)
            assert found is not None
            yield self.recipe.replaced(found)

    def _least_recomputed(self, vision: Changes, *, offload: bool) -> int | None:
        """Return the fewest layers to recompute, attention kept, so that the device's memory
        suffices.

        None if no number does, or if the host's memory is too small for it.
        """

        def fits(number: int) -> bool:
            return self._fits(self._some(number, offload) | vision, device_alone=True)

        # More layers recomputed take less of the device, but more of the host where offloaded: the
        # device alone decides the number, the host whether it will do.
        number = _first(1, _count(self.recipe), fits)
        if number is None or not self._fits(self._some(number, offload) | vision):
            return None
        return number

    def _some(self, number: int, offload: bool) -> Changes:
        """Return changes that recompute the first `number` layers except attention, and no
        others."""
        sent = 0
        if offload:
            sent = number
        return _layers(self.recipe, number=number, kept=number, sent=sent)

    def _least_sent(self, vision: Changes, *, kept: int) -> Changes | None:
        """Return changes that offload the fewest layers so that the device's memory suffices.

        All layers are recomputed, and the last `kept` keep attention. None if no number suffices,
        or if the host's memory is too small for it.
        """
        count = _count(self.recipe)

        def choice(sent: int) -> Changes:
            return _layers(self.recipe, kept=kept, sent=sent) | vision

        sent = _first(0, count, lambda sent: self._fits(choice(sent), device_alone=True))
        if sent is None or not self._fits(choice(sent)):
            return None
        return choice(sent)

    def _fits(self, changes: Changes, *, device_alone: bool = False) -> bool:
        need = self.need(self.recipe.replaced(changes))
        if device_alone:
            return need.fits_device(self.room)
        return need.fits(self.room)


def _mlp(recipe: Recipe) -> Changes:
    """Return changes after which layers keep everything but the interior of their MLPs."""
    return NO_LEVERS | {
        "training.recompute_granularity": "selective",
        "training.recompute_modules": ["mlp"],
        "training.mlp_chunk_tokens": _chunk(recipe, LayerPlan(kept="all_but_mlp")),
    }


def _layers(recipe: Recipe, *, kept: int, sent: int, number: int = 0) -> Changes:
    """Return changes that recompute the first `number` layers of a stage (0: all).

    The last `kept` of those keep attention's output, the first `sent` are offloaded to the host.
    """
    recomputed = number or _count(recipe)
    plan = LayerPlan(kept="input")
    if kept:
        plan = LayerPlan(kept="input_and_attention")
    fraction = 1.0
    if sent < recomputed:
        # `layer_memory` rounds up: half a layer less gives the same number for any rounding.
        fraction = round(max(sent - 0.5, 0) / recomputed, 4)
    # "All layers" has a value of its own, which stays right for stages with fewer layers.
    if kept == recomputed:
        kept = -1
    if recomputed == _count(recipe):
        recomputed = 0
    return NO_LEVERS | {
        "training.recompute_granularity": "full",
        "training.recompute_num_layers": recomputed,
        "training.recompute_keep_attention_layers": kept,
        "training.mlp_chunk_tokens": _chunk(recipe, plan),
        "training.activation_offload_fraction": fraction,
    }


def _chunk(recipe: Recipe, plan: LayerPlan) -> int:
    """Return the tokens of an MLP's piece; 0 for the whole sequence at once.

    As many as need no more memory than attention does, which no lever reduces.
    """
    tensors = layer_tensors(recipe)
    most = tensors.attention_working(plan.kept)
    tokens = recipe.data.seq_length // recipe.parallel.context_parallel_size
    if tensors.mlp_working(plan) <= most:
        return 0
    # 8-bit layers take pieces of equal length.
    is_even = recipe.training.fp8_recipe != "none"
    # One piece was tried above.
    chunks = [c for c in CHUNKS if c < tokens and not (is_even and tokens % c)]
    # The largest piece that needs no more than attention does; the smallest if none does.
    for chunk in chunks:
        pieces = ceil_div(tokens, chunk)
        if tensors.mlp_working(LayerPlan(kept=plan.kept, pieces=pieces)) <= most:
            return chunk
    if chunks:
        return chunks[-1]
    return 0


def _vision_choices(recipe: Recipe) -> list[Changes]:
    """Return the ways of recomputing the tower, the one that keeps most first."""
    training = recipe.training
    off = {"training.recompute_vision": False, "training.recompute_vision_method": "layers"}
    if recipe.model.text_only or recipe.is_frozen("vision_model"):
        return [off]
    at_once = min(training.vision_tiles_at_once, TILES_AT_ONCE)
    by_layers = off | {"training.recompute_vision": True}
    by_tiles = by_layers | {
        "training.recompute_vision_method": "tiles",
        "training.vision_tiles_at_once": at_once,
    }
    return [off, by_layers, by_tiles]


def _count(recipe: Recipe) -> int:
    """Return the largest number of layers that a rank runs one after another."""
    stages = recipe.parallel.layers_of_stages(recipe.model.language.num_layers)
    return max(stages) // recipe.parallel.virtual_pipeline_model_parallel_size


def _telling_stages(recipe: Recipe) -> list[int]:
    """Return the stages of which one needs most memory: the first two and the last."""
    # The first encodes tiles, the last scores rows; of those between, the earliest holds the
    # activations of most packs in flight.
    last = recipe.parallel.pipeline_model_parallel_size - 1
    return sorted({0, min(1, last), last})


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """Return the least number of a range for which a condition holds; None if it holds for none.

    The condition must hold for all larger numbers too.
    """
    numbers = range(low, high + 1)
    index = bisect.bisect_left(numbers, True, key=holds)
    if index < len(numbers):
        return numbers[index]
    return None
