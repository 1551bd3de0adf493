"""A run that is told to stop before its end: it finishes the step, saves, and says so."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Hears SIGTERM, which launchers and schedulers send, and SIGUSR1, while it is entered. A second one kills."""

    def __init__(self) -> None:
        self.heard = ""  # the signal's name
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) or signal.SIG_DFL for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])
