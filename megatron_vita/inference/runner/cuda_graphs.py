"""CUDA graphs: a forward pass over tensors at fixed addresses, recorded once and launched as
one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A recorded call. Its inputs are whatever tensors the function reads: contents may change, but
    not their place."""

    def __init__(self, function: Callable[[], Tensor], *, pool: Any) -> None:
        """Runs the function once, so that kernels are compiled and buffers made, then records
        it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        self._function = function  # keeps alive what it reads
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function()

    def launch(self) -> Tensor:
        """The function's output for what its inputs now hold."""
        self._graph.replay()
        return self._output

    def close(self) -> None:
        """Gives the recording back."""
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
        """The graph of a call. Collective where the function is."""
        self._graphs.append(Graph(function, pool=self._handle))
        return self._graphs[-1]

    def close(self) -> None:
        """Gives all graphs back at once: whoever made them may be part of a cycle that is collected
        much later."""
        while self._graphs:
            self._graphs.pop().close()
