"""Low-rank adapters (LoRA) beside linear maps, at every parallel layout.

A map W has an update: y = W x + scale * B A x, of which A and B alone are trained. Where one of our
maps joins several of Hugging Face's (query, key and value; gate and up), each has an A and a B of
its own. Their As are one matrix `a` [pieces * r, in]; the rows of `b` lie as those of W, and each
reads the r columns of its own piece, so that one product gives the update in W's order.

Tensor parallelism follows the map: a column-parallel map has `b` split as W's rows and `a` whole, a
row-parallel one `a` split as W's columns and `b` whole. Only A x, of r columns for each piece, crosses
the ranks beyond what W x does.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_vita.config import AdaptedMap, LinearMap
from megatron_vita.model.initial_weights import generator_of
from megatron_vita.parallel import groups

ADAPTER = "lora"
"""Name of the adapter as a submodule of its linear map."""


def is_adapter(name: str) -> bool:
    """Tell whether a parameter or tensor of this name belongs to an adapter."""
    return f".{ADAPTER}." in name


class AdapterDropout:
    """Dropout whose masks can be drawn again: a layer that is recomputed must see the same ones.

    A mask follows from the numbers of the pass through the layer and of the call within it (of a
    piece of the sequence), both set by `begin`.
    """

    def __init__(self, probability: float, *, name: str, seed: int, replicated: bool) -> None:
        self.probability = probability
        replica = groups.data_parallel_group(with_context_parallel=True).rank()
        # Ranks with the same input must drop the same elements.
        rank = 0 if replicated else groups.tensor_group().rank()
        self._place = f"{seed}/{name}/{replica}/{rank}"
        self._pass = 0
        self._call = 0

    def begin(self, number: int) -> None:
        """Set the number of the pass whose masks are drawn next."""
        self._pass = number
        self._call = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Drop elements of `x`, and scale up the others."""
        if not self.probability:
            return x
        generator = generator_of(f"{self._place}/{self._pass}/{self._call}", x.device)
        self._call += 1
        kept = torch.empty_like(x).bernoulli_(1 - self.probability, generator=generator)
        return x * kept.div_(1 - self.probability)


class Adapter(nn.Module):
    """Low-rank update of one linear map on this rank."""

    choice: Tensor
    needs_output = False  # backward reads the map's output

    def __init__(
        self,
        adapted: AdaptedMap,
        *,
        rank: int,
        scale: float,
        sequence_parallel: bool,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name = adapted.linear.name
        self.rank = rank
        self.scale = scale
        self.split = adapted.linear.split
        self.sequence_parallel = sequence_parallel and self.split is not None
        self.group = groups.tensor_group()
        self.dropout = AdapterDropout(
            dropout, name=self.name, seed=seed, replicated=self._has_replicated_input
        )
        pieces = len(adapted.chosen)
        columns = adapted.linear.inputs
        choice = _choice(adapted)
        if self.split == "row":
            columns //= self.group.size()
        elif self.split == "column":
            choice = choice.chunk(self.group.size(), dim=1)[self.group.rank()]
        self.a = nn.Parameter(torch.empty(pieces * rank, columns))
        self.b = nn.Parameter(torch.zeros(*choice.shape[:2], rank))
        # Follows from the recipe: no part of a checkpoint.
        self.register_buffer("choice", choice, persistent=False)
        self.enabled = True
        self._mark_parameters()

    @property
    def _has_replicated_input(self) -> bool:
        """True if all TP ranks have the same input."""
        return self.split is None or (self.split == "column" and not self.sequence_parallel)

    def _mark_parameters(self) -> None:
        """Set megatron-core's marks: which parameters are split, and whose gradients are partial."""
        if self.split is None:
            return
        split, whole = (self.b, self.a) if self.split == "column" else (self.a, self.b)
        set_tensor_model_parallel_attributes(split, True, 1, 1)
        # The whole one multiplies this rank's rows of the sequence alone.
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw A as PEFT does, uniformly within 1 / sqrt(inputs), the same at every layout; B is
        0."""
        inputs = self.a.shape[1]
        if self.split == "row":
            inputs *= self.group.size()
        generator = generator_of(f"{seed}/{self.name}", torch.device("cpu"))
        # On the host, and whole: the numbers depend neither on the device nor on the layout.
        whole = torch.empty(len(self.a), inputs).uniform_(-1, 1, generator=generator)
        whole /= inputs**0.5
        if self.split == "row":
            whole = whole.chunk(self.group.size(), dim=1)[self.group.rank()]
        self.a.copy_(whole)
        self.b.zero_()

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the update to the map's output.

        Args:
            x: input of the map on this rank [..., in].
            output: the map's output [..., out] on this rank; it is not changed.
        """
        if not self.enabled:
            return output
        if self.training:
            x = self.dropout(x)
        hidden = self.reduce(F.linear(x, self.a))
        weight = self.output_weight()
        updated = torch.addmm(
            output.flatten(0, -2), hidden.flatten(0, -2), weight.t(), alpha=self.scale
        )
        return updated.view(*output.shape)

    def reduce(self, hidden: Tensor) -> Tensor:
        """Carry A x [..., pieces * r] from the rows or columns of this rank to those that B needs."""
        if self.split is None or self.group.size() == 1:
            return hidden
        if self.split == "column" and self.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.group
            )
        if self.split == "column":
            return copy_to_tensor_model_parallel_region(hidden, group=self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        return reduce_from_tensor_model_parallel_region(hidden, group=self.group)

    def output_weight(self) -> Tensor:
        """Return B with the columns of all pieces [out, pieces * r], zero in those of other pieces."""
        rows = self.b.flatten(0, 1)
        choice = self.choice.flatten(0, 1).to(rows.dtype)
        return (choice[:, :, None] * rows[:, None, :]).flatten(1)

    def sharded_state(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded tensors of the parameters, the same at every layout."""
        axes = {}
        if self.split is not None:
            axes = {"b": 1, "d": 1} if self.split == "column" else {"a": 1}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            dict(self.named_parameters()),
            f"{self.name}.{ADAPTER}.",
            axes,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {name.rpartition(".")[2]: tensor for name, tensor in state.items()}


def _choice(adapted: AdaptedMap) -> Tensor:
    """Return the adapter of each row of the whole map, one-hot: [stack, rows, pieces]."""
    # Its numbers are read also where weights are built without memory.
    with torch.device("cpu"):
        owners = row_owners(adapted.linear)
        return (owners[..., None] == torch.tensor(adapted.chosen)).float()


def row_owners(linear: LinearMap) -> Tensor:
    """Return the number of the piece that each row of a whole map belongs to: [stack, rows].

    Rows are stacked where each of several pieces is split over TP by itself.
    """
    counts = torch.tensor([piece.outputs for piece in linear.pieces])
    numbers = torch.arange(len(counts))
    if not linear.groups:
        return numbers[:, None].expand(-1, int(counts[0]))
    of_group = numbers.repeat_interleave(counts // linear.groups)
    return of_group.repeat(linear.groups)[None]


def adapter_of(linear: nn.Module) -> Adapter | None:
    """Return the adapter of a linear map, if it has one."""
    return getattr(linear, ADAPTER, None)


def attach(linear: nn.Module, adapter: nn.Module) -> None:
    """Let a module, called with a map's input and output, change the output."""
    linear.add_module(ADAPTER, adapter)
    linear.register_forward_hook(_add_update)


def _add_update(linear: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
    """Add the adapter's update to the output of a linear map, which may be beside its bias."""
    if isinstance(output, tuple):
        return (linear.lora(inputs[0], output[0]), *output[1:])
    return linear.lora(inputs[0], output)


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a chunk's modules by name, with the decoder's layers numbered through the whole
    model."""
    numbers = {}
    for name, module in model.named_modules():
        if number := getattr(module, "layer_number", None):
            numbers[name] = f"{name.rpartition('.')[0]}.{number - 1}"
        yield _renumbered(name, numbers), module


def _renumbered(name: str, numbers: dict[str, str]) -> str:
    for local, whole in numbers.items():
        if name == local or name.startswith(f"{local}."):
            return whole + name.removeprefix(local)
    return name


def adapters_of(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield a chunk's adapters with their names as submodules."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module


@contextmanager
def adapters_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Compute with the base alone meanwhile."""
    adapters = [adapter for model in models for _, adapter in adapters_of(model)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def with_adapters(
    state: dict[str, Any], model: nn.Module, *, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return a chunk's sharded state with its adapters described by themselves.

    Each layer's adapters have names of their own, as layers need not have the same ones; modules
    around them would stack the layers, and take every tensor for a copy on all TP ranks.
    """
    kept = {name: value for name, value in state.items() if not is_adapter(name)}
    for prefix, adapter in adapters_of(model):
        sharded = adapter.sharded_state(metadata=metadata)
        kept |= {f"{prefix}.{name}": tensor for name, tensor in sharded.items()}
    return kept
