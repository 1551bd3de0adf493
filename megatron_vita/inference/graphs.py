"""CUDA graphs: a forward pass over tensors at fixed addresses, recorded once and launched as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A recorded call. Its inputs are whatever tensors the function reads: their contents may change, not their place.

    All graphs share a memory pool, since they never run at the same time; an output is overwritten by the next launch
    of any graph.
    """

    _pool: Any = None

    def __init__(self, function: Callable[[], Tensor]) -> None:
        """Runs the function once, so that kernels are compiled and buffers made, then records it. Collective where the
        function is."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        self._function = function  # keeps alive what it reads
        self._graph = torch.cuda.CUDAGraph()
        Graph._pool = Graph._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self._graph, pool=Graph._pool, capture_error_mode="thread_local"):
            self._output = function()

    def launch(self) -> Tensor:
        """The function's output for what its inputs now hold."""
        self._graph.replay()
        return self._output

    def close(self) -> None:
        """Gives the recording back at once: whoever made it may be part of a cycle that is collected much later."""
        self._graph.reset()
        del self._function, self._output
