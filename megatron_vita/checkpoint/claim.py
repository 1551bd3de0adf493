"""The job that saves to a folder: the last one that began.

Two jobs in one folder would remove each other's checkpoints: a run that was started twice, or the
part of an elastic job that was cut off and continues alone.
"""

import os
import secrets
import socket
import time
from pathlib import Path

from megatron_vita.errors import ClaimedError
from megatron_vita.files import atomic_write

NAME = "job"


class Claim:
    """Claim of this job to the checkpoints of a folder.

    folder: parent of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        self._text = f"{began} on {socket.gethostname()}, process {os.getpid()}"
        # A process number is not unique: in containers both starts may have the same.
        self._token = secrets.token_hex(8)

    def take(self) -> None:
        """Take the folder over from an earlier job."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path, concurrent=True) as partial:
            partial.write_text(f"{self._token}\n{self._text}\n", encoding="utf-8")

    def check(self) -> None:
        """Check that no later job has taken the folder over.

        Raises:
            ClaimedError: one has.
        """
        try:
            token, _, text = self._path.read_text("utf-8", errors="replace").partition("\n")
        # Removed by hand, so no later job has claimed it.
        except FileNotFoundError:
            self.take()
            return
        if token != self._token:
            raise ClaimedError(
                f"{self._path.parent}: another job saves here since {text.strip()}; this one ({self._text}) "
                "ends without saving. Give each run a checkpoint.save of its own"
            )
