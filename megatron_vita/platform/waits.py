"""Time that the main thread of this rank waits for collectives to complete."""

import threading
import time
from typing import Any

from torch.distributed import Work

_wait = Work.wait
_work: Any = Work  # its methods may be replaced


class CollectiveWaits:
    """Sum of the seconds that the main thread waited since `start`.

    torch has no hook for it, so the method that every wait goes through is replaced. With gloo that
    is all communication; with NCCL the host only tells the device to wait, and nearly none.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def start(self) -> None:
        """Start to measure."""

        def timed(work: Work, *arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return _wait(work, *arguments, **keywords)
            began = time.perf_counter()
            try:
                return _wait(work, *arguments, **keywords)
            finally:
                self.seconds += time.perf_counter() - began

        _work.wait = timed

    def stop(self) -> None:
        """Stop measuring."""
        _work.wait = _wait
