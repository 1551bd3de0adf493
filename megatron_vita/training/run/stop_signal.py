"""Stop signals: a run that receives one finishes its step, saves, and ends."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 5.0
"""Signals within this time count as one: a supervisor and a launcher may both pass on the same."""
LAUNCHED = "TORCHELASTIC_RUN_ID"


class StopRequest:
    """Handler of SIGTERM, which launchers and schedulers send, SIGUSR1 and SIGINT (Ctrl-C).

    Active while entered. A later second signal kills; a second Ctrl-C does so at once.
    """

    def __init__(self) -> None:
        self.received = ""  # the first signal's name
        self._received_at = 0.0
        self._repeated_interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Python sets handlers from the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: a handler that was not set by Python, which cannot be restored.
                self._before[number] = signal.signal(number, self._receive) or signal.SIG_DFL
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received = signal.Signals(number).name
            self._received_at = now
            return
        is_soon = now - self._received_at <= REPEAT_SECONDS
        if not (self._may_be_the_same(number) and is_soon):
            is_interrupt = number == signal.SIGINT
            # The sender insists: restore the signal's effect without this handler.
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
            signal.raise_signal(number)

    def _may_be_the_same(self, number: int) -> bool:
        """Tell whether a signal may be the first one, passed on. A terminal sends Ctrl-C to every
        process; torchrun alone sends it to its ranks once more."""
        if number != signal.SIGINT:
            return True
        self._repeated_interrupts += 1
        return LAUNCHED in os.environ and self._repeated_interrupts == 1
