"""The engine: requests in, pieces of answers out, one forward pass of all ranks at a time."""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.config import ParallelConfig, Recipe, recipe_from_dict
from megatron_vita.data.datasets import document_format
from megatron_vita.errors import ConfigError, DataError, EngineError, LogitsError, VitaError
from megatron_vita.inference.engine.answering import Answering
from megatron_vita.inference.engine.block_pool import BlockPool
from megatron_vita.inference.engine.channel import StepChannel
from megatron_vita.inference.engine.rank_monitor import PeerWatch
from megatron_vita.inference.engine.scheduler import Policy, Request, Scheduler
from megatron_vita.inference.engine.worker import StepResult, Worker
from megatron_vita.inference.generation.sampling import Draw, draw_tokens
from megatron_vita.inference.prompt import MediaFile, PreparedPrompt, Prompt, prepare_prompt
from megatron_vita.inference.requests import Answer, AnswerPiece, SamplingParams
from megatron_vita.inference.runner.cache_size import build_cache
from megatron_vita.inference.step import Step
from megatron_vita.inference.vision import decode_pool
from megatron_vita.inference.vision.decode_pool import MediaReaders
from megatron_vita.inference.vision.tile_decoder import DECODERS
from megatron_vita.media.video import VideoInfo
from megatron_vita.model.backends import TorchBackend
from megatron_vita.model.build import build_model
from megatron_vita.parallel import groups
from megatron_vita.supervise.shared_memory import SharedFile
from megatron_vita.text.vocabulary import check_ids, open_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the engine may use."""

    chunk_tokens: int = 32768  # tokens of prompts in one forward pass
    busy_chunk_tokens: int = 4096  # the same while answers wait for their next tokens
    # room of the cache; None: what memory leaves on CUDA, 65,536 elsewhere
    cache_tokens: int | None = None
    cache_dtype: Literal["model", "fp8"] = "model"
    page_tokens: int = 128
    max_running: int = 64  # answers that are decoded at a time
    # tokens of prompt and answer; None: the recipe's data.seq_length
    max_context: int | None = None
    # what looking at a video, decoding an image or up to 64 frames may take
    media_seconds: float = 60.0
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "busy_chunk_tokens", "page_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.media_seconds < math.inf:
            raise ConfigError(f"media_seconds is {self.media_seconds}: it must be positive")
        if self.page_tokens & (self.page_tokens - 1):
            raise ConfigError(f"page_tokens is {self.page_tokens}: it must be a power of two")
        if self.cache_dtype not in ("model", "fp8"):
            raise ConfigError(f"cache_dtype is {self.cache_dtype!r}; known: model, fp8")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request; `cached_tokens` of the prompt were found in the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """What the engine is at, and what it has done since its start."""

    running: int
    waiting: int
    cache_tokens: int
    cache_tokens_used: int
    prompt_tokens_total: int
    cached_tokens_total: int
    completion_tokens_total: int


class Engine:
    """A model over TP x CP ranks. Rank 0 takes requests; the others call `serve_as_worker`."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        options: EngineOptions | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Weights of a checkpoint, or first ones. The process group must exist, and be one replica
        without PP."""
        _check_layout(recipe.parallel)
        groups.initialize_groups(recipe.parallel)
        self.recipe, self.options = recipe, options or EngineOptions()
        self.tokenizer = open_tokenizer(recipe)
        self.form = document_format(recipe, self.tokenizer)
        # two readers are left to look at new videos while tiles are decoded
        self._readers = MediaReaders(
            self.form.tile_format, count=DECODERS + 2, seconds=self.options.media_seconds
        )
        if not self.form.text_only:
            decode_pool.start()
        self.model = build_model(recipe, backend=TorchBackend()).eval()
        if checkpoint is not None:
            store.load_weights([self.model], checkpoint)
            logger.info("weights from %s", checkpoint)
        self.max_context = self.options.max_context or recipe.data.seq_length
        group = groups.host_group("train")
        self._channel = None if group is None else StepChannel(group)
        self._lost: list[EngineError] = []
        self._tell_loss: Callable[[EngineError], None] = self._lost.append
        self._watch = None if group is None else PeerWatch(group, on_loss=self._lose)
        self._closed = False
        self._start()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        tokenizer: str | None = None,
        parallel: ParallelConfig | None = None,
        options: EngineOptions | None = None,
    ) -> "Engine":
        """The model of a checkpoint of any layout; `tokenizer` replaces the recorded place."""
        platform.initialize_process()
        checkpoint = store.find_checkpoint(path)
        recipe = recipe_from_dict(store.read_manifest(checkpoint)["recipe"])
        recipe.parallel = parallel or ParallelConfig()
        if tokenizer is not None:
            recipe.text.tokenizer = tokenizer
        # converted weights bring theirs
        elif (inside := checkpoint / recipe.text.tokenizer).exists():
            recipe.text.tokenizer = str(inside)
        return cls(recipe, options=options, checkpoint=checkpoint)

    def _start(self) -> None:
        options, shape = self.options, self.recipe.model.language
        cache, blocks = build_cache(
            self.recipe,
            page_tokens=options.page_tokens,
            tokens=options.cache_tokens,
            chunk_tokens=options.chunk_tokens,
            fp8=options.cache_dtype == "fp8",
        )
        longest = (
            cache.layout.blocks_for(min(self.max_context, blocks * cache.layout.block_tokens)) + 1
        )
        self.worker = Worker(
            self.model,
            cache,
            recipe=self.recipe,
            form=self.form,
            readers=self._readers,
            max_blocks=longest,
            graphs=options.cuda_graphs,
        )
        self.worker.warm_up()
        self.layout = cache.layout
        self._pool = BlockPool(blocks)
        policy = Policy(
            chunk_tokens=options.chunk_tokens,
            busy_chunk_tokens=min(options.busy_chunk_tokens, options.chunk_tokens),
            max_running=options.max_running,
            max_context=self.max_context,
        )
        self._scheduler = Scheduler(self._pool, layout=self.layout, policy=policy)
        self._answering: dict[int, Answering] = {}
        self._ended_early: list[AnswerPiece] = []
        self._numbers = itertools.count()
        self._totals = Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0)
        logger.info(
            "%d layers, cache of %d tokens (%s)",
            shape.num_layers,
            self.cache_tokens,
            options.cache_dtype,
        )

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds over all ranks."""
        return (self._pool.count - 1) * self.layout.block_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._ended_early) or self._scheduler.has_work

    def prepare(self, prompt: Prompt, *, max_frames: int | None = None) -> PreparedPrompt:
        """The prompt in tokens. Any thread may do it. DataError for what is wrong with it."""
        return prepare_prompt(prompt, form=self.form, probe=self._probe, max_frames=max_frames)

    def _probe(self, video: MediaFile) -> VideoInfo:
        return self._readers.probe(SharedFile(video.data), video.name)

    def add(self, prepared: PreparedPrompt, sampling: SamplingParams) -> int:
        """Takes a request and gives its number. DataError if it can never be answered."""
        if prepared.tokens >= self.max_context:
            raise DataError(
                f"the prompt has {prepared.tokens} tokens; with an answer at most {self.max_context} are possible"
            )
        check_ids(prepared.document.input_ids, rows=self.recipe.model.language.vocab_size)
        width = max(sampling.n, sampling.num_beams)
        if width > self.options.max_running:
            raise DataError(
                f"{width} answers at a time are asked for; at most {self.options.max_running} are possible"
            )
        needed = self._scheduler.ceiling_of(prepared.tokens, sampling)
        if needed > self._pool.count - 1:
            raise DataError(
                f"a prompt of {prepared.tokens} tokens with answers of up to {sampling.max_new_tokens} takes "
                f"{needed * self.layout.block_tokens} tokens of the cache, which has {self.cache_tokens}"
            )
        room = self.max_context - prepared.tokens
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        keys = prepared.block_keys(
            self.layout.block_tokens, rows_per_tile=self.form.vision.image_token_length
        )
        request = Request(
            number=next(self._numbers), prepared=prepared, sampling=sampling, keys=keys
        )
        self._answering[request.number] = Answering(
            request,
            scheduler=self._scheduler,
            tokenizer=self.tokenizer,
            end_ids=self.end_ids,
            rows_per_tile=self.form.vision.image_token_length,
        )
        self._scheduler.waiting.append(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Ends a request's answers; their last pieces come with the next step."""
        if number in self._answering:
            self._ended_early += self._answering[number].cancel()

    def idle(self) -> None:
        """To be called now and then where there is no work: it shows the other ranks that this one
        is there."""
        self._execute(Step())

    def step(self) -> list[AnswerPiece]:
        """One forward pass, and what it adds to answers. EngineError where the engine cannot go
        on."""
        pieces, self._ended_early = self._ended_early, []
        step = self._scheduler.next_step()
        if step is None:
            return pieces
        return pieces + self._use(step, self._execute(step))

    def usage(self, number: int) -> Usage:
        """Tokens of a request, also after its end until `forget`."""
        answering = self._answering[number]
        return Usage(
            prompt_tokens=answering.request.prepared.tokens,
            cached_tokens=answering.request.cached_tokens,
            completion_tokens=answering.completion_tokens,
        )

    def forget(self, number: int) -> None:
        """A request that has ended and is not asked about any longer."""
        usage = self.usage(number)
        self._totals = Usage(
            **{
                name: value + getattr(usage, name)
                for name, value in dataclasses.asdict(self._totals).items()
            }
        )
        del self._answering[number]

    def statistics(self) -> EngineStatistics:
        """What the engine is at."""
        scheduler, now = self._scheduler, [self.usage(number) for number in self._answering]
        return EngineStatistics(
            running=len(scheduler.running) + len(scheduler.prefilling),
            waiting=len(scheduler.waiting),
            cache_tokens=self.cache_tokens,
            cache_tokens_used=self._pool.used * self.layout.block_tokens,
            prompt_tokens_total=self._totals.prompt_tokens + sum(u.prompt_tokens for u in now),
            cached_tokens_total=self._totals.cached_tokens + sum(u.cached_tokens for u in now),
            completion_tokens_total=self._totals.completion_tokens
            + sum(u.completion_tokens for u in now),
        )

    def generate(self, prompts: Sequence[Prompt], *, sampling: SamplingParams) -> list[Answer]:
        """Answers to prompts, `sampling.n` for each, in order. DataError for a prompt that is
        wrong."""
        prepared = [self.prepare(prompt) for prompt in prompts]
        numbers: list[int] = []
        try:
            for prompt in prepared:
                numbers.append(self.add(prompt, sampling))
            pieces: list[AnswerPiece] = []
            while self.has_work:
                pieces += self.step()
        finally:
            for number in numbers:
                self.cancel(number)
                self.forget(number)
            self._ended_early = []
        return [
            _joined(pieces, number, choice) for number in numbers for choice in range(sampling.n)
        ]

    def stream(self, prompt: Prompt, *, sampling: SamplingParams) -> Iterator[AnswerPiece]:
        """Pieces of the answers to one prompt as they come, of an engine that has nothing else to
        do.

        Closing the iterator cancels what is left. DataError for a prompt that is wrong.
        """
        number = self.add(self.prepare(prompt), sampling)
        try:
            while self.has_work:
                yield from self.step()
        finally:
            self.cancel(number)
            self._ended_early = []
            self.forget(number)

    def close(self) -> None:
        """Ends the service of the other ranks."""
        if not self._closed:
            self._closed = True
            self._execute(Step(close=True))
            self._leave()

    def serve_as_worker(self) -> None:
        """Does what rank 0 says until it closes. EngineError if rank 0 is gone."""
        while not (step := self.receive_step()).close:
            with _ranks_are_there():
                self.worker.execute(step)
        self._leave()

    def on_lost_rank(self, told: Callable[[EngineError], None]) -> None:
        """Has `told` called when another rank is gone, by any thread: a step may wait for it inside
        a kernel."""
        self._tell_loss = told
        for error in self._lost:  # it was gone before
            told(error)

    def _lose(self, rank: int) -> None:
        self._tell_loss(EngineError(f"the engine cannot go on: a rank is gone: rank {rank}"))

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self.worker.close()

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(
            {self.tokenizer.end_of_turn_id, self.tokenizer.special_id("<|endoftext|>")}
        )

    def _execute(self, step: Step) -> StepResult:
        changes = self._scheduler.take_changes()
        step = dataclasses.replace(
            step,
            forget=changes.forget,
            begin=changes.begin,
            tables=changes.tables,
            copy=changes.copy,
            announce=changes.announce,
        )
        with _ranks_are_there():
            if self._channel is not None:
                self._channel.send(step)
            return self.worker.execute(step)

    def receive_step(self) -> Step:
        """What rank 0 says next. EngineError if it is gone."""
        assert self._channel is not None, "an engine of one rank has no workers"
        with _ranks_are_there():
            return self._channel.receive()

    def _use(self, step: Step, result: StepResult) -> list[AnswerPiece]:
        """Draws tokens from the logits of a step."""
        self._scheduler.note_ready(result.ready)
        if result.logits is None:
            return []
        by_sequence = {s.number: a for a in self._answering.values() for s in a.request.sequences}
        pieces: list[AnswerPiece] = []
        for sequence, reason in result.failed.items():
            pieces += by_sequence.pop(sequence).fail(reason)
        for piece in step.prefill:
            if piece.sequence in by_sequence:
                by_sequence[piece.sequence].remember_prompt()
        ended = [piece.sequence for piece in step.prefill if piece.ends_prompt]
        rows = ended or [sequence for sequence, _, _ in step.decode]
        logits = result.logits[:, : self.tokenizer.vocab_size]  # rows of padding are no tokens
        return pieces + self._draw(logits, [by_sequence.get(sequence) for sequence in rows])

    def _draw(self, logits: Tensor, owners: list[Answering | None]) -> list[AnswerPiece]:
        """What the logits [rows, V] of a step add to answers; rows of one request follow one
        another."""
        pieces: list[AnswerPiece] = []
        draws: list[tuple[Answering, int, Draw]] = []
        for owner, group in itertools.groupby(range(len(owners)), key=lambda row: owners[row]):
            rows = list(group)
            if owner is None:
                continue
            own = logits[rows[0] : rows[-1] + 1]
            if owner.beams is None:
                draws += [(owner, rows[0] + row, draw) for row, draw in owner.draws(own)]
                continue
            try:
                pieces += owner.advance_beams(own)
            except LogitsError as error:
                pieces += owner.fail(str(error), finish="model_error")
        return pieces + self._draw_each(logits, draws)

    def _draw_each(
        self, logits: Tensor, draws: list[tuple[Answering, int, Draw]]
    ) -> list[AnswerPiece]:
        """One token for each draw (of whom, row, how); requests whose logits are no numbers
        fail."""
        try:
            scored = draw_tokens(
                logits[[row for _, row, _ in draws]], [draw for _, _, draw in draws]
            )
        except LogitsError as error:
            wrong = {id(draws[row][0]): draws[row][0] for row in error.rows}
            failed = [
                piece
                for owner in wrong.values()
                for piece in owner.fail(str(error), finish="model_error")
            ]
            return failed + self._draw_each(
                logits, [draw for draw in draws if id(draw[0]) not in wrong]
            )
        pieces: list[AnswerPiece] = []
        for owner, taken in itertools.groupby(
            zip(draws, scored, strict=True), key=lambda each: each[0][0]
        ):
            pieces += owner.take([token for _, token in taken])
        return pieces


def _joined(pieces: list[AnswerPiece], number: int, choice: int) -> Answer:
    mine = [piece for piece in pieces if (piece.request, piece.choice) == (number, choice)]
    finish = mine[-1].finish
    assert finish is not None
    return Answer(
        text="".join(piece.text for piece in mine),
        token_ids=[token for piece in mine for token in piece.token_ids],
        finish=finish,
        scores=[score for piece in mine for score in piece.scores],
        error=mine[-1].error,
    )


def _check_layout(parallel: ParallelConfig) -> None:
    if parallel.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size is {parallel.pipeline_model_parallel_size}: serving splits a model "
            "over tensor_model_parallel_size and context_parallel_size alone; checkpoints of any layout can be read"
        )
    if parallel.sequence_parallel:
        raise ConfigError("parallel.sequence_parallel is true: serving does without; leave it out")
    world = dist.get_world_size()
    if parallel.replica_size != world:
        raise ConfigError(
            f"there are {world} processes, and tensor_model_parallel_size {parallel.tensor_model_parallel_size} x "
            f"context_parallel_size {parallel.context_parallel_size} is {parallel.replica_size}: they must be equal"
        )


@contextlib.contextmanager
def _ranks_are_there() -> Iterator[None]:
    """Turns what a lost rank causes into one clear error."""
    try:
        yield
    except VitaError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise EngineError(
            f"the engine cannot go on: a rank is gone or failed: {reason[0]}"
        ) from error
