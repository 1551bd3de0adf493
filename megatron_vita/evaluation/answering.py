"""Answering of prompts by an engine in this process, or by a chat completions server."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from typing import Protocol

from megatron_vita.errors import DataError, LogitsError, RefusedError
from megatron_vita.inference.client.client import ChatServer
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import CompletionOutput, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer; for a refused prompt `error` holds the reason and the text is empty."""

    text: str = ""
    prompt_tokens: int | None = None  # None where the answerer does not report them
    error: str = ""


class Answerer(Protocol):
    """Interface of an engine or server that answers prompts."""

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        """Yield a reply for each prompt, in order. Prompts are not consumed before they are
        needed."""


class Generates(Protocol):
    """The part of an engine's interface that is used here."""

    def generate(
        self, prompts: Sequence[Prompt], *, sampling: SamplingParams
    ) -> Sequence[CompletionOutput]:
        """Return an answer for each prompt.

        Raises:
            DataError: a prompt is invalid.
        """


class EngineAnswerer:
    """An engine, given `at_once` prompts at a time."""

    def __init__(self, engine: Generates, *, at_once: int) -> None:
        self.engine = engine
        self.at_once = at_once

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        """Implement `Answerer.answers`."""
        for batch in batched(prompts, self.at_once):
            try:
                yield from [
                    _reply(answer) for answer in self.engine.generate(batch, sampling=sampling)
                ]
            except DataError:
                # The engine refuses a batch for one of its prompts: ask one by one to find it.
                for prompt in batch:
                    yield self._answer(prompt, sampling)

    def _answer(self, prompt: Prompt, sampling: SamplingParams) -> Reply:
        try:
            return _reply(self.engine.generate([prompt], sampling=sampling)[0])
        except DataError as error:
            return Reply(error=str(error))


def _reply(answer: CompletionOutput) -> Reply:
    """Convert an engine's answer.

    A prompt that the engine cannot finish (media turn out to be damaged) counts as refused, like
    one that it does not start.
    """
    # Logits that are not finite say that the model is broken: all further answers would be wrong.
    if answer.finish == "model_error":
        raise LogitsError(answer.error)
    if answer.finish == "error":
        return Reply(error=answer.error)
    return Reply(text=answer.text)


class ServerAnswerer:
    """A server, sent at most `at_once` requests at a time."""

    def __init__(self, server: ChatServer, *, at_once: int) -> None:
        self.server = server
        self.at_once = at_once

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        """Implement `Answerer.answers`.

        Raises:
            ServerError: the server cannot be reached or refuses the key.
        """
        with ThreadPoolExecutor(self.at_once) as pool:
            in_flight: deque[Future[Reply]] = deque()
            try:
                # Prompts are made as they are sent: thousands of images would not fit in memory.
                # Replies come in order, so that a slow one may leave the pool idle for a while.
                for prompt in prompts:
                    in_flight.append(pool.submit(self._answer, prompt, sampling))
                    if len(in_flight) == self.at_once:
                        yield in_flight.popleft().result()
                while in_flight:
                    yield in_flight.popleft().result()
            finally:
                # On an error, requests that have not begun are not sent.
                pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: Prompt, sampling: SamplingParams) -> Reply:
        try:
            completion = self.server.complete(prompt, sampling=sampling)
        except (RefusedError, DataError) as error:
            return Reply(error=str(error))
        return Reply(text=completion.text, prompt_tokens=completion.prompt_tokens)
