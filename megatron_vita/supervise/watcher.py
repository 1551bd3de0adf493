"""Watcher of a job: a process beside the first rank that receives the states of all ranks.

    python -m megatron_vita.supervise.watcher < settings

It reads a line of JSON from stdin (the arguments of `Watcher`), prints its port, and ends when stdin
is closed, which is when the first rank has ended. It imports nothing heavy, and shares nothing with
a rank that could hang.
"""

import asyncio
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.supervise.beacon import inspect_process, kill
from megatron_vita.supervise.hang import RankView, summarize, unrecorded_wait, write_report

FOLDER = "hangs"
ANSWER_SECONDS = 5.0
"""Time for a rank to report its stacks."""
MESSAGE_BYTES = 1 << 26
"""Maximum length of a message: the stacks of a rank with many threads are long."""
END_SECONDS = 2.0
"""Time for ranks to end by themselves."""


@dataclass(kw_only=True)
class _Link:
    """A rank's connection."""

    view: RankView
    files: dict[str, str]  # of its stacks and its state, on its host
    writer: asyncio.StreamWriter
    heard: float  # time of the last message
    answers: "asyncio.Queue[dict[str, Any]]"
    has_left: bool = False

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer; empty if none comes in time."""
        try:
            await _send(self.writer, question)
            return await asyncio.wait_for(self.answers.get(), ANSWER_SECONDS)
        except (OSError, TimeoutError):
            return {}


class Watcher:
    """Receiver of the ranks' states, which detects that the job hangs.

    Args:
        timeout: seconds without progress of any rank, or without a message of one.
        token: secret that ranks send.
        folder: folder of the run, for the report; empty for none.
        is_one_host: all ranks are on this host; nothing else can connect.
    """

    def __init__(self, *, timeout: float, token: str, folder: str, is_one_host: bool) -> None:
        self._is_one_host = is_one_host
        self._timeout = timeout
        self._token = token
        self._folder = folder
        self._links: dict[int, _Link] = {}
        self.is_reporting = False

    async def serve(self) -> None:
        """Listen, print the port, and watch until a hang has been reported."""
        server = await asyncio.start_server(
            self._hear, sock=_listen(is_one_host=self._is_one_host), limit=MESSAGE_BYTES
        )
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        while not (stuck := self._stuck_for()):
            await asyncio.sleep(self._timeout / 20)
        await self._report(stuck)

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._hear_rank(reader, writer)
        except (OSError, ValueError):
            writer.close()  # the rank is gone: its last state stays

    async def _hear_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = json.loads(await reader.readline())
        if hello.get("token") != self._token:
            writer.close()
            return
        view = RankView(rank=hello["rank"], host=hello["host"], pid=hello["pid"])
        link = _Link(
            view=view,
            files={name: hello[name] for name in ("stack_file", "state_file")},
            writer=writer,
            heard=time.monotonic(),
            answers=asyncio.Queue(),
        )
        self._links[view.rank] = link
        while line := await reader.readline():
            message = json.loads(line)
            link.heard = time.monotonic()
            if "state" in message:
                # While a report is made, the states that caused it are kept.
                if not self.is_reporting:
                    view.state = message["state"]
                await _send(writer, {})
            elif "bye" in message:
                link.has_left = True
            else:
                link.answers.put_nowait(message)

    def _stuck_for(self) -> float:
        """Return the seconds without progress of any rank, if they exceed the timeout; else 0.

        Ranks that wait for a slow one do not hang: the job does when none makes progress.
        """
        now = time.monotonic()
        watched = [link for link in self._links.values() if not link.has_left]
        for link in watched:
            link.view.silent = now - link.heard
        shortest = min((link.view.idle for link in watched), default=0.0)
        if shortest <= self._timeout:
            return 0.0
        # A rank's last message may have come long after its main thread began to wait.
        for link in watched:
            link.view.is_silent = link.view.silent > self._timeout / 3
        return shortest

    async def _report(self, seconds: float) -> None:
        self.is_reporting = True
        await asyncio.gather(*(self._look_at(link) for link in self._links.values()))
        views = [self._links[rank].view for rank in sorted(self._links)]
        line = summarize(views, seconds=seconds)
        text = write_report(views, seconds=seconds)
        # In a thread: the file system may be what hangs.
        saved = asyncio.create_task(asyncio.to_thread(self._save, text))
        done, _ = await asyncio.wait([saved], timeout=ANSWER_SECONDS)
        place = saved.result() if done else ""
        if place:
            line = f"{line}; all ranks and their stacks are in {place}"
        else:
            sys.stderr.write(text)
        await self._end(line)

    async def _look_at(self, link: _Link) -> None:
        view = link.view
        if view.is_silent:
            view.inspected = await self._inspect(view.host, {"pid": view.pid, **link.files})
            if last := view.inspected.get("last"):
                # Its idle time is of now, not of the last message.
                view.state = last | {"idle": last["idle"] - view.silent}
            view.stacks = view.inspected.get("stacks", "")
            return
        answer = await link.ask({"stacks": True})
        stacks = answer.get("stacks", {})
        view.state = view.state | {"keys": answer.get("keys", view.state.get("keys", []))}
        view.place = stacks.get("place", "")
        view.pending = answer.get("pending") or unrecorded_wait(view.place)
        view.stacks = stacks.get("all", "")

    async def _inspect(self, host: str, question: dict[str, Any]) -> dict[str, Any]:
        """Describe a process of `host`, from here or through another rank there."""
        if host == socket.gethostname():
            return await asyncio.to_thread(lambda: inspect_process(**question))
        for link in self._links.values():
            if link.view.host == host and not link.view.is_silent:
                answer = await link.ask({"inspect": question})
                inspected: dict[str, Any] = answer.get("inspected", {})
                return inspected
        return {}

    def _save(self, text: str) -> str:
        if not self._folder:
            return ""
        path = Path(self._folder) / FOLDER / time.strftime("hang_%Y%m%d_%H%M%S.txt")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            sys.stderr.write(f"{path}: cannot be written: {error}\n")
            return ""
        return str(path)

    async def _end(self, line: str) -> None:
        """Let all ranks end, and have those killed that cannot.

        Those of this host after the others have ended: a launcher takes the first to end for the
        cause.
        """
        here = socket.gethostname()
        silent = [link.view for link in self._links.values() if link.view.is_silent]
        for link in self._links.values():
            if not link.view.is_silent and not link.has_left:
                there = [view.pid for view in silent if here != view.host == link.view.host]
                try:
                    await _send(link.writer, {"end": line, "kill": there})
                except OSError:
                    continue
        await asyncio.sleep(END_SECONDS)
        for link in self._links.values():
            if link.view.host == here:
                kill(link.view.pid)


def _listen(*, is_one_host: bool) -> socket.socket:
    """Return a socket on a free port: of this host alone, or of all of its addresses."""
    if is_one_host:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


async def _watch(settings: dict[str, Any]) -> None:
    watcher = Watcher(**settings)
    watching = asyncio.create_task(watcher.serve())
    # The pipe is closed when the first rank ends, in any way.
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([watching, ended], return_when=asyncio.FIRST_COMPLETED)
    # The first rank may be the first to end because of a hang.
    if watcher.is_reporting:
        await watching
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_watch(json.loads(sys.stdin.readline())))
