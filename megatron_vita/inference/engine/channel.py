"""Broadcast of steps from rank 0: one message where a step is small, as decode steps are."""

import pickle

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vita.inference.requests.scheduler_output import SchedulerOutput

_SMALL = 4096
_HEADER = 8
"""Bytes that hold the length of what follows."""


class StepChannel:
    """Sends steps from the first rank of a gloo group to all others."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._small = torch.zeros(_SMALL, dtype=torch.uint8)

    def send(self, step: SchedulerOutput) -> None:
        """Send a step; called by the first rank."""
        data = pickle.dumps(step, protocol=pickle.HIGHEST_PROTOCOL)
        self._small[:_HEADER] = _bytes(len(data).to_bytes(_HEADER, "little"))
        # A broadcast of unknown size would need two messages; decode steps fit into one of a fixed
        # size.
        fits = len(data) <= _SMALL - _HEADER
        if fits:
            self._small[_HEADER : _HEADER + len(data)] = _bytes(data)
        dist.broadcast(self._small, group=self.group, group_src=0)
        if not fits:
            dist.broadcast(_bytes(data), group=self.group, group_src=0)

    def receive(self) -> SchedulerOutput:
        """Receive a step; called by all other ranks."""
        dist.broadcast(self._small, group=self.group, group_src=0)
        length = int.from_bytes(self._small[:_HEADER].numpy().tobytes(), "little")
        rest = self._small[_HEADER : _HEADER + length]
        if length > _SMALL - _HEADER:
            rest = torch.empty(length, dtype=torch.uint8)
            dist.broadcast(rest, group=self.group, group_src=0)
        # Only ranks of the same job are in the group.
        return pickle.loads(rest.numpy().tobytes())


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
