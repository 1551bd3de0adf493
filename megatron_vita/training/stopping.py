"""A run that is told to stop before its end: it finishes the step, saves, and says so."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_SECONDS = 5.0
"""Signals within it are one: a supervisor and a launcher may both pass on what one of them got."""


class StopRequest:
    """Hears SIGTERM, which launchers and schedulers send, and SIGUSR1, while it is entered. Another
    one later kills."""

    def __init__(self) -> None:
        self.heard = ""  # the first signal's name
        self._heard_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._hear) or signal.SIG_DFL for number in SIGNALS
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.heard:
            self.heard = signal.Signals(number).name
            self._heard_at = now
        elif now - self._heard_at > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
