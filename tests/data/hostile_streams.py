"""Streams that misbehave in the reader's process as decoders may: they hang, crash or run out of
memory."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from megatron_vita.data.loading.stream import PackStream, ReadPack


class HostileStream(PackStream):
    """At `document` of `pack` does `deed`: hang, die, die_of_memory, die_in_turns or die_once; or
    earlier: break, start_dying, start_hanging or start_slowly. If the deed is dawdle, it takes its
    time before each file of each document.
    """

    pack = document = -1
    deed = ""
    memory = ""  # a file that remembers what was done

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.deed == "start_slowly":
            time.sleep(6)

    def read(self, pack_id: int, **options: Any) -> ReadPack:
        if pack_id != self.pack:
            return super().read(pack_id, **options)
        if self.deed == "break":
            raise RuntimeError("a mistake of ours")
        if self.deed == "start_dying":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.deed == "start_hanging":
            time.sleep(3600)
        inner = options.pop("progress")

        def progress(document: int) -> None:
            inner(document)
            if self.deed == "dawdle":
                time.sleep(0.3)
            elif document == self.document:
                self._strike()

        return super().read(pack_id, progress=progress, **options)

    def _strike(self) -> None:
        if self.deed == "hang":
            time.sleep(3600)
        elif self.deed == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.deed == "die_of_memory":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.deed == "die_in_turns":
            with open(self.memory, "a") as file:
                file.write(".")
            os.kill(
                os.getpid(),
                signal.SIGSEGV if Path(self.memory).stat().st_size == 3 else signal.SIGKILL,
            )
        elif self.deed == "die_once" and not Path(self.memory).exists():
            Path(self.memory).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def hostile(
    stream: PackStream, deed: str, *, pack: int, document: int = 0, memory: str = ""
) -> HostileStream:
    """The stream, turned hostile."""
    stream.__class__ = HostileStream
    assert isinstance(stream, HostileStream)
    stream.deed = deed
    stream.pack = pack
    stream.document = document
    stream.memory = memory
    return stream
