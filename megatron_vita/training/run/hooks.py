"""Calls of callbacks' hooks, with errors of one rank raised on all ranks."""

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.errors import CallbackError, ConfigError, StoppedError, VitaError
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback

if TYPE_CHECKING:
    from megatron_vita.training.run.run import Run

logger = logging.getLogger(__name__)


class Hooks:
    """The callbacks of a run, in the order in which their hooks are called.

    As a context: `on_start` at its beginning; at its end `on_complete`, `on_stop` or `on_error`, and
    then `on_end`. An error in a hook is kept until all ranks know of it, and then raised on all.
    """

    def __init__(self, run: "Run", callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        self._run = run
        self._error: Exception | None = None
        self._message = ""  # description of `_error` for other ranks
        self._failed: list[Callback] = []
        self._overriding: dict[str, list[Callback]] = {}
        self._known = False  # all ranks know that a hook has failed on some rank

    @property
    def has_failed(self) -> bool:
        """True if a hook has failed on this rank."""
        return self._error is not None

    @property
    def knows_failure(self) -> bool:
        """True if the run ends after this step, since a hook has failed on some rank. The same on
        all ranks."""
        return self._known

    def overriding(self, hook: str) -> list[Callback]:
        """Return the callbacks that override `hook`; looked up once."""
        if hook not in self._overriding:
            base = getattr(Callback, hook)
            self._overriding[hook] = [
                callback
                for callback in self.callbacks
                if getattr(getattr(callback, hook), "__func__", None) is not base
            ]
        return self._overriding[hook]

    def call(self, hook: str, *arguments: Any, **keywords: Any) -> None:
        """Call a hook of all callbacks that have not failed."""
        for callback in self.overriding(hook):
            if callback in self._failed:
                continue
            try:
                getattr(callback, hook)(self._run, *arguments, **keywords)
            except Exception as error:
                # The other ranks wait in its collective: this one must not enter another.
                if callback.collective:
                    raise
                self._keep(error, callback, hook)

    def announce_failure(self) -> None:
        """Record that some rank failed, to be raised at the end of the step. The same on all
        ranks."""
        self._known = True

    def after_step(self, metrics: StepMetrics) -> None:
        """Call `after_step`, then raise what failed on some rank. Collective.

        Raises:
            CallbackError: on all ranks.
        """
        if metrics.failed:
            self.announce_failure()
        self.call("after_step", metrics)
        if self._known:
            self._raise()

    def __enter__(self) -> "Hooks":
        self._check_same()
        self.call("on_start")
        try:
            self._agree()
        except CallbackError as error:
            self._end_failed(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._end_failed(error)
            return
        try:
            self._complete()
        except BaseException as failure:  # also Ctrl-C, since uploads may take long
            self._end_failed(failure)
            raise
        self.call("on_end")
        self._agree()

    def _complete(self) -> None:
        self._agree()  # on what followed the last step
        self.call("on_complete")
        self._agree()

    def _end_failed(self, error: BaseException) -> None:
        # Another error may end the run before ranks agree on that of a hook.
        if self._error is not None and self._error is not error.__cause__:
            logger.warning("%s", self._message)
        if isinstance(error, StoppedError):
            self._call_last("on_stop")
        else:
            self._call_last("on_error", error)
        self._call_last("on_end")

    def _call_last(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks; an error is logged, since another ends the run already."""
        for callback in self.overriding(hook):
            try:
                getattr(callback, hook)(self._run, *arguments)
            except Exception as error:
                logger.warning("%s", self._describe(error, callback, hook))

    def _keep(self, error: Exception, callback: Callback, hook: str) -> None:
        self._failed.append(callback)
        if self._error is None:
            self._error = error
            self._message = self._describe(error, callback, hook)

    def _describe(self, error: Exception, callback: Callback, hook: str) -> str:
        where = f"{name_of(callback)}.{hook}, rank {dist.get_rank()}, step {self._run.step}"
        text = " ".join(str(error).split())
        if isinstance(error, VitaError):
            return f"callback {where}: {text}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"callback {where}: {type(error).__name__}: {text} ({place})"

    def _check_same(self) -> None:
        """Check that all ranks have the same callbacks. Collective.

        Raises:
            ConfigError: they differ.
        """
        # Else ranks would wait for each other in the collectives of different callbacks.
        names = [name_of(callback) for callback in self.callbacks]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, names)
        for rank, theirs in enumerate(gathered):
            if theirs != gathered[0]:
                raise ConfigError(
                    f"callbacks of train: rank {rank} has {', '.join(theirs)}; rank 0 has "
                    f"{', '.join(gathered[0])}: give every rank the same, in the same order"
                )

    def _agree(self) -> None:
        """Raise on all ranks an error of any. Collective."""
        failed = torch.tensor(float(self.has_failed), device=platform.device())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed.item():
            self._raise()

    def _raise(self) -> None:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._message)
        raise CallbackError(next(filter(None, gathered))) from self._error


def name_of(callback: Callback) -> str:
    """Return the module and class of a callback."""
    kind = type(callback)
    return f"{kind.__module__}.{kind.__qualname__}"
