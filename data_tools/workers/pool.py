"""Worker processes that may be killed: a decoder that hangs or crashes costs one sample.

A task consists of steps, usually one for each sample. A worker reports the beginning and the end of
each step to its supervisor. If a step exceeds the time limit or ends its process, the process is
replaced and the task starts again with the known outcomes of its steps; the step that failed is
then a bad sample.
"""

import logging
import os
import re
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from data_tools.workers.on_ray import run_on_ray
from megatron_vita.config.parsing.fields import check_fields, described
from megatron_vita.errors import DataError, PlatformError, VitaError
from megatron_vita.supervise.processes import WorkerProcess, fork_server

logger = logging.getLogger(__name__)
CORES = len(os.sched_getaffinity(0))
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Memory address in the messages of some decoders, removed so that reasons are reproducible."""
FAULT = "this sample meets a fault of the program"
# Modules that the fork server imports once for all workers: those of the work functions.
PRELOADED = [
    "data_tools.sharding",
    "data_tools.importing",
    "data_tools.validation",
    "data_tools.planning",
]
Work = Callable[[Any, "SampleGuard"], Any]


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Execution of tasks in local processes or on Ray. Fields are options of the commands."""

    workers: int = described(
        CORES, "Worker processes; 0: work in this process, without a time limit.", ge=0
    )
    # A step of a task is a sample, for most commands.
    time_limit: float = described(
        120.0, "Time limit of a sample in seconds; one that takes longer is rejected.", gt=0
    )
    executor: Literal["local", "ray"] = described(
        "local", "Local processes, or the Ray cluster of this host."
    )

    def __post_init__(self) -> None:
        check_fields(self, as_options=True)


IN_PROCESS = WorkerOptions(workers=0)


class SampleGuard:
    """Guard of a task's steps, which are numbered in order, equally each time the task is run.

    Args:
        outcomes: outcome of steps in an earlier attempt: a reason, or "" if the step was good.
        tell: sends a message to the supervisor.
    """

    def __init__(self, outcomes: dict[int, str], tell: Callable[..., object]) -> None:
        self._outcomes = outcomes
        self._tell = tell
        self._count = 0
        self.amount = 0

    def advance(self, amount: int = 1) -> None:
        """Report progress of the task by `amount`."""
        self.amount += amount
        self._tell("at", self.amount)

    def run(self, action: Callable[[bool], Any]) -> Any:
        """Run a step, `action(known)`; `known`: it was good in an earlier attempt and needs no
        checks.

        Raises:
            DataError: the step is bad: by its own error, its time, or the death of its process.
        """
        number = self._count
        self._count += 1
        # Not run again: it would hang or kill the process as before.
        outcome = self._outcomes.get(number)
        if outcome:
            raise DataError(outcome)
        self._tell("begin", number)
        reason = ""
        try:
            return as_data_error(partial(action, outcome == ""))
        except DataError as error:
            reason = str(error)
            raise
        finally:
            # Also for a bad step: the time until the next one is no sample's.
            self._tell("end", number, reason)


def as_data_error(action: Callable[[], Any]) -> Any:
    """Run an action that reads a sample; all that is wrong with the sample becomes DataError.

    Unexpected exceptions do, too, with FAULT in front, and are logged: one sample in a million must
    not end the work.
    """
    try:
        return action()
    except DataError as error:
        raise DataError(ADDRESS.sub("", str(error))) from error
    except VitaError:
        raise
    # Sizes in a damaged file may ask for any amount of memory.
    except MemoryError as error:
        raise DataError("it needs more memory than there is") from error
    except Exception as error:
        logger.exception(FAULT)
        raise DataError(f"{FAULT}: {type(error).__name__}: {error}") from error


def run_tasks(
    work: Work,
    tasks: Sequence[Any],
    *,
    options: WorkerOptions,
    on_advance: Callable[[int], object] = lambda amount: None,
) -> Iterator[tuple[int, Any]]:
    """Yield (number, `work(task, guard)`) of each task, in order of completion.

    Args:
        work: a function at the top level of a module.
        tasks: arguments of `work`, which can be pickled.
        options: processes and time limit.
        on_advance: called with the progress that `work` reports.

    Raises:
        VitaError: the first error of `work`, which ends all.
    """
    if not tasks:
        return iter(())
    if options.executor == "ray":
        return _run_there(work, tasks, options, on_advance)
    if options.workers == 0:
        return _run_here(work, tasks, on_advance)
    return _Supervisor(work, tasks, options, on_advance).results()


def _run_there(
    work: Work, tasks: Sequence[Any], options: WorkerOptions, on_advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    # Ray passes no messages while a task runs: progress arrives with the result.
    for number, (result, amount) in run_on_ray(partial(_run_one, work, options), tasks):
        on_advance(amount)
        yield number, result


def _run_one(work: Work, options: WorkerOptions, task: Any) -> tuple[Any, int]:
    """Run one task in a process that may be killed; returns its result and its progress."""
    amounts: list[int] = []
    # A process inside the Ray task, since Ray would run the task again as a whole where a decoder
    # crashes.
    alone = WorkerOptions(workers=1, time_limit=options.time_limit)
    ((_, result),) = run_tasks(work, [task], options=alone, on_advance=amounts.append)
    return result, sum(amounts)


def _run_here(
    work: Work, tasks: Sequence[Any], on_advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    for number, task in enumerate(tasks):
        guard = SampleGuard({}, lambda *_: None)
        yield number, work(task, guard)
        on_advance(guard.amount)


class _Supervisor:
    """Assigns tasks to worker processes and replaces those that hang or die."""

    def __init__(
        self,
        work: Work,
        tasks: Sequence[Any],
        options: WorkerOptions,
        on_advance: Callable[[int], object],
    ) -> None:
        self._work = work
        self._tasks = tasks
        self._options = options
        self._on_advance = on_advance
        self._waiting = deque(range(len(tasks)))
        self._workers: list[_Worker] = []

    def results(self) -> Iterator[tuple[int, Any]]:
        try:
            self._workers = [
                _Worker(self._work) for _ in range(min(self._options.workers, len(self._tasks)))
            ]
            for worker in self._workers:
                self._assign(worker)
            while busy := [worker for worker in self._workers if worker.task is not None]:
                ready = wait([worker.pipe for worker in busy], timeout=self._seconds_left(busy))
                for worker in busy:
                    # The message first: a worker that has answered at the last moment is not late.
                    if worker.pipe in ready:
                        yield from self._on_message(worker)
                    elif worker.is_late():
                        self._replace(
                            worker,
                            f"it took longer than the time limit of {self._options.time_limit:g} s",
                        )
        finally:
            for worker in self._workers:
                worker.kill()

    def _seconds_left(self, busy: list["_Worker"]) -> float | None:
        """Seconds until the first timeout of a worker; None if no worker is in a step."""
        deadlines = [worker.deadline for worker in busy if worker.step is not None]
        if deadlines:
            return max(min(deadlines) - time.monotonic(), 0)
        return None

    def _assign(self, worker: "_Worker") -> None:
        worker.task = None
        worker.outcomes = {}
        worker.reached = 0
        if self._waiting:
            worker.task = self._waiting.popleft()
            worker.send(self._tasks[worker.task])

    def _on_message(self, worker: "_Worker") -> Iterator[tuple[int, Any]]:
        try:
            word, *values = worker.pipe.recv()
        # The death of a worker closes its pipe, which `wait` reports as ready.
        except (EOFError, OSError):
            self._replace(worker, worker.cause_of_death())
            return
        if word == "begin":
            worker.step = values[0]
            worker.deadline = time.monotonic() + self._options.time_limit
        elif word == "end":
            worker.step = None
            worker.outcomes[values[0]] = values[1]
        elif word == "at":
            # A repeated task reports its earlier progress again, which must not count twice.
            self._on_advance(max(values[0] - worker.reached, 0))
            worker.reached = max(values[0], worker.reached)
        elif word == "done":
            assert worker.task is not None
            yield worker.task, values[0]
            self._assign(worker)
        else:
            # An error of the user or of ours, which ends all; bad samples are outcomes of steps.
            raise values[0]

    def _replace(self, worker: "_Worker", reason: str) -> None:
        """Kill a worker; its replacement repeats the task, without the step that failed."""
        assert worker.task is not None
        # Between steps no sample is being read: the host itself kills processes.
        if worker.step is None:
            raise PlatformError(
                f"a worker process ended between two samples: {reason}; is there enough memory?"
            )
        worker.outcomes[worker.step] = reason
        worker.restart()
        worker.send(self._tasks[worker.task])


class _Worker:
    """A worker process, its task and current step, the outcomes of its steps, and its progress."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.task: int | None = None
        self.step: int | None = None
        self.outcomes: dict[int, str] = {}
        self.reached = 0
        self.deadline = 0.0
        self._start()

    def send(self, task: Any) -> None:
        """Send a task, with the known outcomes of its steps."""
        self.pipe.send((task, self.outcomes))

    def is_late(self) -> bool:
        return self.step is not None and time.monotonic() >= self.deadline

    def cause_of_death(self) -> str:
        code = self._process.exit_code() or 0
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return f"reading it ended the process with {how}"

    def restart(self) -> None:
        self.kill()
        self.step = None
        self._start()

    def kill(self) -> None:
        self._process.kill()

    @property
    def pipe(self) -> Connection:
        return self._process.pipe

    def _start(self) -> None:
        self._process = WorkerProcess(fork_server(*PRELOADED), _serve, self._work)


def _serve(pipe: Connection, work: Work) -> None:
    """Run one task after another until the worker is killed or its supervisor is gone."""
    while True:
        try:
            task, outcomes = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", work(task, SampleGuard(outcomes, lambda *words: pipe.send(words)))))
        except VitaError as error:
            pipe.send(("error", error))
        except BrokenPipeError:
            return
        except Exception:
            # As text: an exception of a library may not survive pickling.
            pipe.send(("error", RuntimeError(traceback.format_exc())))
