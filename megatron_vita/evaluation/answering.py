"""Who answers: an engine in this process, or a server by the chat completions protocol."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from typing import Protocol

from megatron_vita.errors import DataError, LogitsError, RefusedError
from megatron_vita.inference.client.client import ChatServer
from megatron_vita.inference.prompt import Prompt
from megatron_vita.inference.requests import CompletionOutput, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer; or, where the prompt was refused, `error` says why and the text is empty."""

    text: str = ""
    prompt_tokens: int | None = None  # where whoever answers tells
    error: str = ""


class Answerer(Protocol):
    """Anything that answers prompts."""

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        """A reply for each prompt, in order. Prompts are taken no earlier than they are needed."""


class Generates(Protocol):
    """What is asked of an engine."""

    def generate(
        self, prompts: Sequence[Prompt], *, sampling: SamplingParams
    ) -> Sequence[CompletionOutput]:
        """An answer for each prompt. DataError for a prompt that is wrong."""


class EngineAnswerer:
    """An engine that is given `at_once` prompts at a time."""

    def __init__(self, engine: Generates, *, at_once: int) -> None:
        self.engine = engine
        self.at_once = at_once

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        """See `Answerer`."""
        for batch in batched(prompts, self.at_once):
            try:
                yield from [
                    _reply(answer) for answer in self.engine.generate(batch, sampling=sampling)
                ]
            except DataError:
                for prompt in batch:  # one of them is refused: which?
                    yield self._answer(prompt, sampling)

    def _answer(self, prompt: Prompt, sampling: SamplingParams) -> Reply:
        try:
            return _reply(self.engine.generate([prompt], sampling=sampling)[0])
        except DataError as error:
            return Reply(error=str(error))


def _reply(answer: CompletionOutput) -> Reply:
    """What an engine cannot finish (media that turn out to be damaged) is refused like what it does
    not begin."""
    if answer.finish == "model_error":
        raise LogitsError(answer.error)
    if answer.finish == "error":
        return Reply(error=answer.error)
    return Reply(text=answer.text)


class ServerAnswerer:
    """A server that is sent at most `at_once` requests at a time."""

    def __init__(self, server: ChatServer, *, at_once: int) -> None:
        self.server = server
        self.at_once = at_once

    def answers(self, prompts: Iterable[Prompt], *, sampling: SamplingParams) -> Iterator[Reply]:
        """See `Answerer`. ServerError where the server cannot be reached or refuses the key."""
        with ThreadPoolExecutor(self.at_once) as pool:
            under_way: deque[Future[Reply]] = deque()
            try:
                for prompt in prompts:
                    under_way.append(pool.submit(self._answer, prompt, sampling))
                    if len(under_way) == self.at_once:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: Prompt, sampling: SamplingParams) -> Reply:
        try:
            completion = self.server.complete(prompt, sampling=sampling)
        except (RefusedError, DataError) as error:
            return Reply(error=str(error))
        return Reply(text=completion.text, prompt_tokens=completion.prompt_tokens)
