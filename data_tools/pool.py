"""Work in processes that may be killed: a decoder that hangs or crashes costs one sample, never the
job.

A task is made of steps, usually one for each sample. A worker tells its watcher when it begins and
ends a step; where a step outlives the time limit or takes its process along, the process is
replaced, the task starts again with what is known of its steps, and the step that did it is bad,
for that reason.
"""

import logging
import multiprocessing
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
from typing import Any

from data_tools.on_ray import run_on_ray
from megatron_vita.errors import ConfigError, DataError, PlatformError, VitaError
from megatron_vita.supervise.processes import end_with_parent

logger = logging.getLogger(__name__)
CORES = len(os.sched_getaffinity(0))
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Where a file lay in memory, which some decoders tell: reasons are the same in every run."""
FAULT = "this sample meets a fault of the program"
EXECUTORS = ("local", "ray")
PRELOADED = [
    "data_tools.sharding",
    "data_tools.importing",
    "data_tools.validation",
    "data_tools.planning",
]
Work = Callable[[Any, "Steps"], Any]


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who does the work: `workers` processes of this machine (0: this process, without a time
    limit), or a cluster.

    `time_limit` is what a step may take, in seconds.
    """

    workers: int = CORES
    time_limit: float = 120.0
    executor: str = "local"

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"--workers is {self.workers}: it must not be negative")
        if self.time_limit <= 0:
            raise ConfigError(f"--time-limit is {self.time_limit}: it must be positive")
        if self.executor not in EXECUTORS:
            raise ConfigError(f"--executor is {self.executor!r}; known: {', '.join(EXECUTORS)}")


class Steps:
    """The steps of a task, counted as they come: the same ones in the same order whenever the task
    is done again."""

    def __init__(self, verdicts: dict[int, str], tell: Callable[..., object]) -> None:
        self._verdicts = verdicts
        self._tell = tell
        self._count = 0
        self.amount = 0

    def advance(self, amount: int = 1) -> None:
        """Reports that so much more of the task is behind it."""
        self.amount += amount
        self._tell("at", self.amount)

    def run(self, action: Callable[[bool], Any]) -> Any:
        """What `action(known)` gives; `known`: an earlier attempt found this step good, so nothing
        need be checked.

        DataError with the reason if the step is bad: by itself, by its time, by the death of its
        process.
        """
        number = self._count
        self._count = self._count + 1
        verdict = self._verdicts.get(number)
        if verdict:
            raise DataError(verdict)
        self._tell("begin", number)
        reason = ""
        try:
            return judged(partial(action, verdict == ""))
        except DataError as error:
            reason = str(error)
            raise
        finally:
            self._tell("end", number, reason)


def judged(action: Callable[[], Any]) -> Any:
    """What `action`, which reads a sample, gives. Whatever is wrong with the sample is a DataError.

    What nobody foresaw is, too, with FAULT in front, and logged: one sample in a million must not
    end the work.
    """
    try:
        return action()
    except DataError as error:
        raise DataError(ADDRESS.sub("", str(error))) from error
    except VitaError:
        raise
    except MemoryError as error:
        raise DataError("it needs more memory than there is") from error
    except Exception as error:
        logger.exception(FAULT)
        raise DataError(f"{FAULT}: {type(error).__name__}: {error}") from error


def run_tasks(
    work: Work,
    tasks: Sequence[Any],
    *,
    crew: Crew,
    on_advance: Callable[[int], object] = lambda amount: None,
) -> Iterator[tuple[int, Any]]:
    """(number of the task, `work(task, steps)`) of each task, in the order in which they end.

    `work` is a function of a module; `on_advance` is given what it reports. The first VitaError
    that `work` raises is raised here and ends all.
    """
    if not tasks:
        return iter(())
    if crew.executor == "ray":
        return _run_there(work, tasks, crew, on_advance)
    if crew.workers == 0:
        return _run_here(work, tasks, on_advance)
    return _Watch(work, tasks, crew, on_advance).results()


def _run_there(
    work: Work, tasks: Sequence[Any], crew: Crew, on_advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    for number, (result, amount) in run_on_ray(partial(_run_one, work, crew), tasks):
        on_advance(amount)
        yield number, result


def _run_one(work: Work, crew: Crew, task: Any) -> tuple[Any, int]:
    """The result of one task, done in a process that may be killed, and what it reported."""
    amounts: list[int] = []
    alone = Crew(workers=1, time_limit=crew.time_limit)
    ((_, result),) = run_tasks(work, [task], crew=alone, on_advance=amounts.append)
    return result, sum(amounts)


def _run_here(
    work: Work, tasks: Sequence[Any], on_advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    for number, task in enumerate(tasks):
        steps = Steps({}, lambda *_: None)
        yield number, work(task, steps)
        on_advance(steps.amount)


class _Watch:
    """Deals tasks to worker processes and replaces those that hang or die."""

    def __init__(
        self, work: Work, tasks: Sequence[Any], crew: Crew, on_advance: Callable[[int], object]
    ) -> None:
        self._work = work
        self._tasks = tasks
        self._crew = crew
        self._on_advance = on_advance
        self._waiting = deque(range(len(tasks)))
        self._workers: list[_Worker] = []

    def results(self) -> Iterator[tuple[int, Any]]:
        try:
            self._workers = [
                _Worker(self._work) for _ in range(min(self._crew.workers, len(self._tasks)))
            ]
            for worker in self._workers:
                self._deal(worker)
            while busy := [worker for worker in self._workers if worker.task is not None]:
                ready = wait([worker.pipe for worker in busy], timeout=self._patience(busy))
                for worker in busy:
                    if worker.pipe in ready:
                        yield from self._listen(worker)
                    elif worker.is_late():
                        self._replace(
                            worker,
                            f"it took longer than the time limit of {self._crew.time_limit:g} s",
                        )
        finally:
            for worker in self._workers:
                worker.kill()

    def _patience(self, busy: list["_Worker"]) -> float | None:
        """Seconds until the first worker is late."""
        deadlines = [worker.deadline for worker in busy if worker.step is not None]
        if deadlines:
            return max(min(deadlines) - time.monotonic(), 0)
        return None

    def _deal(self, worker: "_Worker") -> None:
        worker.task = None
        worker.verdicts = {}
        worker.reached = 0
        if self._waiting:
            worker.task = self._waiting.popleft()
            worker.send(self._tasks[worker.task])

    def _listen(self, worker: "_Worker") -> Iterator[tuple[int, Any]]:
        try:
            word, *values = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, worker.cause_of_death())
            return
        if word == "begin":
            worker.step = values[0]
            worker.deadline = time.monotonic() + self._crew.time_limit
        elif word == "end":
            worker.step = None
            worker.verdicts[values[0]] = values[1]
        elif word == "at":
            self._on_advance(max(values[0] - worker.reached, 0))
            worker.reached = max(values[0], worker.reached)
        elif word == "done":
            assert worker.task is not None
            yield worker.task, values[0]
            self._deal(worker)
        else:
            raise values[0]

    def _replace(self, worker: "_Worker", reason: str) -> None:
        """Kills a worker; another takes its task up again, without the step that it was at."""
        assert worker.task is not None
        if worker.step is None:
            raise PlatformError(
                f"a worker process ended between two samples: {reason}; is there memory enough?"
            )
        worker.verdicts[worker.step] = reason
        worker.restart()
        worker.send(self._tasks[worker.task])


class _Worker:
    """A worker process, its task, the step that it is at, the verdicts on earlier steps and how far
    it was."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.task: int | None = None
        self.step: int | None = None
        self.verdicts: dict[int, str] = {}
        self.reached = 0
        self.deadline = 0.0
        self._start()

    def send(self, task: Any) -> None:
        """Hands it a task, with what is known of its steps."""
        self.pipe.send((task, self.verdicts))

    def is_late(self) -> bool:
        return self.step is not None and time.monotonic() >= self.deadline

    def cause_of_death(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"reading it ended the process with {how}"

    def restart(self) -> None:
        self.kill()
        self.step = None
        self._start()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        self._process.start()
        theirs.close()


def _serve(pipe: Connection, work: Work) -> None:
    """A worker's life: one task after another, until it is killed or its watcher is gone."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task, verdicts = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", work(task, Steps(verdicts, lambda *words: pipe.send(words)))))
        except VitaError as error:
            pipe.send(("error", error))
        except BrokenPipeError:
            return
        except Exception:
            pipe.send(("error", RuntimeError(traceback.format_exc())))
