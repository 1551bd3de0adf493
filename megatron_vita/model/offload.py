"""Offloading of saved activations to host memory between a layer's forward and backward.

An offloaded tensor stays in autograd's graph: its storage on the device is emptied once the copy is
complete, and filled again before it is read. Other references to it (attention's own record, a
pipeline schedule) then keep no memory alive and still read the right values. Copies run on streams
of their own, outward beside the rest of the layer's forward pass, inward beside the backward pass
of the layer above. No call here blocks the host.

Layers of one forward pass form a chain, which makes the order of passes free: other micro-batches
and model chunks, as pipeline schedules interleave them, have chains of their own.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_vita.platform.pinned import host_buffers

logger = logging.getLogger(__name__)


class HostBuffers:
    """Pool of host buffers by size, pinned on CUDA; reused, since pinning takes seconds."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.count = 0

    def reserve(self, counts: Mapping[int, int]) -> None:
        """Allocate buffers, given their numbers by size in bytes.

        Raises:
            PlatformError: they cannot be pinned.
        """
        sizes = [size for size, count in counts.items() for _ in range(count)]
        for buffer in host_buffers(sizes):
            self.give_back(buffer)
        self.count += len(sizes)

    def take(self, size: int) -> Tensor:
        """Return a free buffer [size] of bytes, or a new one if all reserved ones are in use."""
        if not self._free[size]:
            logger.debug("one more buffer of %d bytes than was reserved", size)
            self.reserve({size: 1})
        return self._free[size].pop()

    def give_back(self, buffer: Tensor) -> None:
        """Free a buffer for reuse, ordered after the work queued so far on the current stream."""
        self._free[len(buffer)].append(buffer)


class ActivationStore:
    """Host buffers and copy streams for the offloaded activations of a rank's layers."""

    def __init__(self) -> None:
        self.buffers = HostBuffers()
        self.outward = torch.cuda.Stream()
        self.inward = torch.cuda.Stream()
        self._latest = LayerActivations(0)

    def open(self, layer_number: int, *, offload: bool) -> "LayerActivations":
        """Begin the record of one forward pass of a layer; layers of a pass have consecutive
        numbers."""
        # Another micro-batch or model chunk begins with a layer that does not follow the latest
        # one: a chain of its own.
        before = self._latest if self._latest.layer_number == layer_number - 1 else None
        self._latest = LayerActivations(
            layer_number, before=before, store=self if offload else None
        )
        return self._latest


class LayerActivations:
    """Activations kept by one layer for one forward pass: on the host with a store, else in
    place."""

    def __init__(
        self,
        layer_number: int,
        *,
        before: "LayerActivations | None" = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.layer_number = layer_number
        self._before = before
        self._store = store
        self._sent: list[_SentTensor] = []

    def keep(self, tensor: Tensor) -> None:
        """Start copying a tensor that backward will read; forward may read it until `leave`."""
        if self._store is None:
            return
        # Emptying the storage of a view would empty the tensors that share it.
        if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
            self._sent.append(_SentTensor(tensor, self._store))
        else:
            logger.warning(
                "layer %d: part of a larger tensor stays on the device", self.layer_number
            )

    def leave(self) -> None:
        """Free the device memory of everything kept, once it is copied."""
        for sent in self._sent:
            sent.leave()

    def fetch(self) -> None:
        """Start copying everything back."""
        for sent in self._sent:
            sent.fetch()

    def fetch_before(self) -> None:
        """Start copying back the previous layer's activations, whose backward comes next."""
        before = self._before
        self._before = None
        if before is not None:
            before.fetch()

    def arrive(self) -> None:
        """Make the current stream wait until everything is back."""
        self.fetch()
        for sent in self._sent:
            sent.arrive()
        self._sent.clear()


class _SentTensor:
    """A tensor and its copy on the host."""

    def __init__(self, tensor: Tensor, store: ActivationStore) -> None:
        self._tensor = tensor.detach()
        self._store = store
        self._buffer = store.buffers.take(tensor.nbytes)
        self._host = self._buffer.view(tensor.dtype).view(tensor.shape)
        self._fetched: torch.cuda.Event | None = None
        # For the tensor to be computed, and the buffer's last content to be read.
        store.outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(store.outward):
            self._host.copy_(self._tensor, non_blocking=True)
        self._sent = _record(store.outward)

    def leave(self) -> None:
        # The allocator may give the memory to later work of this stream, which has to wait.
        torch.cuda.current_stream().wait_event(self._sent)
        self._tensor.untyped_storage().resize_(0)

    def fetch(self) -> None:
        if self._fetched is not None:
            return
        self._tensor.untyped_storage().resize_(self._tensor.nbytes)
        # For the copy to the host, and the last use of the memory that the allocator gave.
        self._store.inward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._store.inward):
            # `data` leaves the version counter as it is: to autograd, the tensor is unchanged.
            self._tensor.data.copy_(self._host, non_blocking=True)
        self._fetched = _record(self._store.inward)

    def arrive(self) -> None:
        assert self._fetched is not None
        torch.cuda.current_stream().wait_event(self._fetched)
        self._store.buffers.give_back(self._buffer)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
