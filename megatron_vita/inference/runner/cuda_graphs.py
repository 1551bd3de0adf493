"""CUDA graphs: a forward pass over tensors at fixed addresses, recorded once and launched as
one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A recorded call. It reads its inputs at fixed addresses: their contents may change, not their
    place."""

    def __init__(self, function: Callable[[], Tensor], *, pool: Any) -> None:
        """Run the function once, so that kernels are compiled and buffers exist, then record it."""
        stream = torch.cuda.Stream()
        # Recording fails if a kernel compiles or a library allocates its workspace meanwhile.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        self._function = function  # keeps alive what it reads
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as a collective's watchdog, may call CUDA during the recording.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function()

    def launch(self) -> Tensor:
        """Replay the call; returns its output for the present contents of its inputs."""
        self._graph.replay()
        return self._output

    def close(self) -> None:
        """Free the recording."""
        self._graph.reset()
        del self._function, self._output


class GraphPool:
    """Graphs that share memory, since they never run at the same time.

    An output is overwritten by the next launch of any of them.
    """

    def __init__(self) -> None:
        # its memory is gone with its last graph, and so is its use
        self._handle = torch.cuda.graph_pool_handle()
        self._graphs: list[Graph] = []

    def record(self, function: Callable[[], Tensor]) -> Graph:
        """Record a call as a graph. Collective where the function is."""
        self._graphs.append(Graph(function, pool=self._handle))
        return self._graphs[-1]

    def close(self) -> None:
        """Free all graphs at once: their owners may be part of reference cycles that are collected
        much later."""
        while self._graphs:
            self._graphs.pop().close()
