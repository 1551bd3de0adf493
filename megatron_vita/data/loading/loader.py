"""Prefetching of packs in supervised processes, in the requested order.

A process without progress is killed after a timeout, and one that dies is replaced. Its pack is
read again, without the sample that hung or that processes repeatedly crashed on. A process killed
from outside only costs time.
"""

import itertools
import pickle
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext

import torch

from megatron_vita.data.loading.ledger import Damage
from megatron_vita.data.loading.stream import PackStream, ReadPack
from megatron_vita.data.loading.worker import (
    DocumentProgress,
    Failure,
    PackTask,
    Ready,
    SentPack,
    receive_message,
    run_worker,
)
from megatron_vita.errors import VitaError
from megatron_vita.supervise.processes import WorkerProcess, fork_server
from megatron_vita.supervise.shared_memory import receive_array

# Exit codes of processes killed from outside, such as by the kernel for want of memory: mostly not
# the fault of the sample, so that more of them are tolerated than of crashes.
EXTERNAL_KILLS = (-signal.SIGKILL, -signal.SIGTERM)
# Crashes or kills while reading one sample, after which it is masked.
MAX_CRASHES_PER_SAMPLE = 2
MAX_KILLS_PER_SAMPLE = 5
STARTUP_SECONDS = 120  # timeout for the imports of a new process
# Failures in a row of processes that have read nothing: the host cannot run them.
MAX_STARTUP_FAILURES = 3
MAX_STARTUP_KILLS = 20
PYTHON_ERROR = 1
"""Exit code of a process that an exception has ended."""


def start_fork_server() -> None:
    """Start the server process from which loader processes are forked.

    It imports their modules, which takes a second or two, in parallel to the caller's work.
    """
    fork_server(__name__)
    forkserver.ensure_running()


def read_packs(
    stream: PackStream,
    tasks: Iterable[PackTask],
    *,
    num_workers: int,
    prefetch: int = 2,
    sample_seconds: float = 300.0,
) -> Iterator[ReadPack]:
    """Yield the packs of `tasks` in order, at most `prefetch` of them in progress or ready.

    Closing or dropping the iterator ends the processes.

    Args:
        stream: the stream to read from.
        tasks: packs to read.
        num_workers: loader processes; 0 reads in this process, without timeout.
        prefetch: packs to read ahead.
        sample_seconds: timeout for progress within a sample.

    Raises:
        VitaError: an error of a loader process, as raised there.
    """
    if not num_workers:
        for task in tasks:
            yield stream.read(task.pack_id, skip=task.skip)
        return
    pool = _Pool(stream, num_workers=num_workers, sample_seconds=sample_seconds)
    ahead: deque[_Job] = deque()
    coming = iter(tasks)
    try:
        while True:
            new = [_Job(task) for task in itertools.islice(coming, prefetch - len(ahead))]
            ahead.extend(new)
            pool.pending.extend(new)
            if not ahead:
                return
            while ahead[0].result is None:
                pool.serve()
            # Readers get new work before the caller computes on this pack.
            pool.assign()
            yield ahead.popleft().take()
    finally:
        pool.close()


class _Job:
    """A pack in progress."""

    def __init__(self, task: PackTask) -> None:
        self.task = task
        self.crashes: Counter[int] = Counter()  # by document
        self.damages: list[Damage] = []
        self.result: ReadPack | Failure | None = None

    def take(self) -> ReadPack:
        if isinstance(self.result, Failure):
            raise self.result.error or RuntimeError(
                f"reading pack {self.task.pack_id + 1} failed:\n{self.result.trace}"
            )
        assert self.result is not None
        return ReadPack(self.result.batch, self.damages + self.result.damages)


class _LoaderProcess(WorkerProcess):
    """A loader process, its current job and its progress in that."""

    def __init__(self, context: ForkServerContext, pickled: bytes) -> None:
        self.progress = DocumentProgress(context)
        super().__init__(context, run_worker, pickled, self.progress)
        self.job: _Job | None = None
        self.ready = False

    def give(self, job: _Job) -> None:
        self.job = job
        self.progress.reset()
        # The exit of a dead process is handled where its pipe is next read.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(job.task)


class _Pool:
    """Assigns jobs to loader processes and replaces those that hang or die."""

    def __init__(self, stream: PackStream, *, num_workers: int, sample_seconds: float) -> None:
        self.pending: deque[_Job] = deque()
        self._stream = stream
        self._limit = sample_seconds
        # Once for all processes and their replacements: a stream holds the names of all shards.
        self._pickled = pickle.dumps(stream, protocol=5)
        self._context = fork_server(__name__)
        self._startup_failures = 0
        self._processes = [self._new_process() for _ in range(num_workers)]

    def _new_process(self) -> _LoaderProcess:
        return _LoaderProcess(self._context, self._pickled)

    def assign(self) -> None:
        """Assign waiting jobs to idle processes."""
        for process in self._processes:
            if process.job is None and self.pending:
                process.give(self.pending.popleft())

    def serve(self) -> None:
        """Wait for a message, an exit or a timeout of a process, and handle it."""
        self.assign()
        busy = {process.pipe: process for process in self._processes if process.job is not None}
        # An exit closes the pipe, so that waiting for messages covers it.
        ready = wait(list(busy), timeout=max(min(map(self._seconds_left, busy.values())), 0))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            self._on_message(busy[pipe])
        if not ready:
            for process in busy.values():
                if self._seconds_left(process) < 0:
                    self._on_timeout(process)

    def _seconds_left(self, process: _LoaderProcess) -> float:
        """Seconds until a process's timeout."""
        limit = self._limit
        if not process.ready:
            limit = max(limit, STARTUP_SECONDS)
        return limit - process.progress.idle_seconds

    def _on_message(self, process: _LoaderProcess) -> None:
        job = process.job
        assert job is not None
        try:
            message = receive_message(process.pipe)
            if isinstance(message, Ready):
                process.ready = True
                return
            if isinstance(message, SentPack):
                message.batch.tiles = torch.from_numpy(receive_array(process.pipe, message.shape))
                job.result = ReadPack(message.batch, message.damages)
            else:
                job.result = message
            process.job = None
            self._startup_failures = 0
        except (EOFError, OSError, RuntimeError):
            self._on_exit(process)

    def _on_timeout(self, process: _LoaderProcess) -> None:
        if (document := process.progress.document) is None:
            self._note_startup_failure(
                f"were silent for {self._limit:g} seconds", most=MAX_STARTUP_FAILURES
            )
        else:
            self._mask(process, document, f"no progress within data.sample_seconds {self._limit:g}")
        self._replace(process)

    def _on_exit(self, process: _LoaderProcess) -> None:
        job = process.job
        assert job is not None
        code = process.exit_code(seconds=10)
        at_startup = MAX_STARTUP_FAILURES
        on_sample = MAX_CRASHES_PER_SAMPLE
        if code in EXTERNAL_KILLS:
            at_startup = MAX_STARTUP_KILLS
            on_sample = MAX_KILLS_PER_SAMPLE
        if (document := process.progress.document) is None:
            advice = ""
            if code == PYTHON_ERROR:
                advice = (
                    "; their errors stand above. They import the program that starts them: one of "
                    'your own needs `if __name__ == "__main__":` before its calls'
                )
            self._note_startup_failure(f"ended (exit code {code})", most=at_startup, advice=advice)
        else:
            job.crashes[document] += 1
            if job.crashes[document] >= on_sample:
                deaths = (
                    f"{job.crashes[document]} processes ended while they read it (exit code {code})"
                )
                self._mask(process, document, deaths)
        self._replace(process)

    def _note_startup_failure(self, what: str, *, most: int, advice: str = "") -> None:
        # Another process that works shows that processes can run here.
        some_read = any(process.progress.document is not None for process in self._processes)
        if some_read:
            self._startup_failures = 0
        else:
            self._startup_failures += 1
        if self._startup_failures >= most:
            raise VitaError(
                f"{self._startup_failures} loader processes {what} before they read anything{advice}"
            )

    def _mask(self, process: _LoaderProcess, document: int, reason: str) -> None:
        job = process.job
        assert job is not None
        job.damages.append(self._stream.damage(job.task.pack_id, document, reason))
        job.task = job.task._replace(skip=job.task.skip | {document})

    def _replace(self, process: _LoaderProcess) -> None:
        job = process.job
        assert job is not None
        process.kill()
        self._processes[self._processes.index(process)] = self._new_process()
        # In front: packs are delivered in order, so that later ones wait for this one.
        self.pending.appendleft(job)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
