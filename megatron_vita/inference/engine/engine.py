"""The engine: takes requests, runs a forward pass of all ranks per step, returns output deltas."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.tokenizer_copy import find_tokenizer
from megatron_vita.config import ParallelConfig, Recipe
from megatron_vita.data.datasets import sample_encoder
from megatron_vita.errors import DataError, EngineError
from megatron_vita.inference.engine.block_pool import BlockPool
from megatron_vita.inference.engine.options import (
    NO_USAGE,
    EngineOptions,
    EngineStatistics,
    Usage,
)
from megatron_vita.inference.engine.output_processor import OutputProcessor, join_deltas
from megatron_vita.inference.engine.rank_monitor import lost_rank_as_engine_error
from megatron_vita.inference.engine.ranks import EngineRanks, check_layout
from megatron_vita.inference.engine.request import Request
from megatron_vita.inference.engine.scheduler import Scheduler, SchedulerConfig
from megatron_vita.inference.engine.worker import StepResult, Worker
from megatron_vita.inference.requests.prompt import (
    MediaFile,
    PreparedPrompt,
    Prompt,
    prepare_prompt,
)
from megatron_vita.inference.requests.scheduler_output import SchedulerOutput
from megatron_vita.inference.requests.types import CompletionOutput, OutputDelta, SamplingParams
from megatron_vita.inference.runner.adapters import load_adapters
from megatron_vita.inference.runner.cache_size import build_cache
from megatron_vita.inference.vision import decode_pool
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.inference.vision.tile_decoder import DECODERS
from megatron_vita.media.video import VideoInfo
from megatron_vita.model.backends.backends import TorchBackend
from megatron_vita.model.build import build_model, take_rows_together
from megatron_vita.parallel import groups
from megatron_vita.supervise.shared_memory import SharedFile
from megatron_vita.text.vocabulary import check_ids, open_tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """A model over TP x CP ranks. Rank 0 takes requests; the others call `serve_as_worker`."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        options: EngineOptions | None = None,
        checkpoint: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """Load the weights of a checkpoint, or initialize them.

        The process group must exist, and hold one replica without pipeline stages.

        Args:
            recipe: the model, and its layout.
            options: sizes and limits; None for the defaults.
            checkpoint: folder of the weights; None for initial ones.
            adapters: checkpoints of adapters by the name that prompts choose them with.
        """
        check_layout(recipe.parallel)
        groups.initialize_groups(recipe.parallel)
        self.recipe = recipe
        self.options = options or EngineOptions()
        self.tokenizer = open_tokenizer(recipe)
        self.encoder = sample_encoder(recipe, self.tokenizer)
        # two more than tiles are decoded by: new videos are probed meanwhile
        self._readers = DecodePool(
            self.encoder.tile_format, count=DECODERS + 2, seconds=self.options.media_seconds
        )
        if not self.encoder.text_only:
            decode_pool.start()
        self.model = build_model(recipe, backend=TorchBackend()).eval()
        take_rows_together(self.model)
        if checkpoint is not None:
            store.load_weights([self.model], checkpoint)
            logger.info("weights from %s", checkpoint)
        self.adapters = load_adapters(self.model, recipe, adapters or {})
        self.max_context = self.options.max_context or recipe.data.seq_length
        self._ranks = EngineRanks(groups.host_group("main"))
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
        adapters: Mapping[str, Path] | None = None,
    ) -> "Engine":
        """Load a checkpoint of any layout; `tokenizer` replaces the recorded path."""
        platform.initialize_process()
        checkpoint = store.find_checkpoint(path)
        recipe = store.recipe_of(checkpoint)
        found = tokenizer or find_tokenizer(checkpoint, recipe.text.tokenizer)
        recipe = recipe.replaced({"text.tokenizer": found})
        return cls(
            recipe.with_layout(parallel or ParallelConfig()),
            options=options,
            checkpoint=checkpoint,
            adapters=adapters,
        )

    def _start(self) -> None:
        options = self.options
        # The cache takes the memory that the weights leave, so it comes after them.
        cache, blocks = build_cache(
            self.recipe,
            page_tokens=options.page_tokens,
            tokens=options.cache_tokens,
            chunk_tokens=options.chunk_tokens,
            fp8=options.cache_dtype == "fp8",
        )
        # The widest block table of a sequence: it ends with the context or with the cache.
        longest = (
            cache.layout.blocks_for(min(self.max_context, blocks * cache.layout.block_tokens)) + 1
        )
        self.worker = Worker(
            self.model,
            cache,
            recipe=self.recipe,
            encoder=self.encoder,
            readers=self._readers,
            max_blocks=longest,
            graphs=options.cuda_graphs,
            adapters=self.adapters,
        )
        self.worker.warm_up()
        self.layout = cache.layout
        self._pool = BlockPool(blocks)
        config = SchedulerConfig(
            chunk_tokens=options.chunk_tokens,
            busy_chunk_tokens=min(options.busy_chunk_tokens, options.chunk_tokens),
            max_running=options.max_running,
            max_context=self.max_context,
        )
        self._scheduler = Scheduler(self._pool, layout=self.layout, config=config)
        self._outputs = OutputProcessor(
            self._scheduler,
            tokenizer=self.tokenizer,
            end_ids=self.end_ids,
            rows_per_tile=self.encoder.vision.image_token_length,
        )
        self._requests: dict[int, Request] = {}
        self._ended_early: list[OutputDelta] = []
        self._numbers = itertools.count()
        self._totals = NO_USAGE  # of requests that are forgotten
        logger.info(
            "%d layers, cache of %d tokens (%s)",
            self.recipe.model.language.num_layers,
            self.cache_tokens,
            options.cache_dtype,
        )

    @property
    def cache_tokens(self) -> int:
        """Capacity of the cache in tokens, over all ranks."""
        # The scratch block holds no tokens.
        return (self._pool.count - 1) * self.layout.block_tokens

    @property
    def has_work(self) -> bool:
        """True if a step would do anything."""
        return bool(self._ended_early) or self._scheduler.has_work

    def prepare(self, prompt: Prompt, *, max_frames: int | None = None) -> PreparedPrompt:
        """Tokenize a prompt and probe its media; any thread may call it.

        Raises:
            DataError: the prompt cannot be used, for the reason that it names.
        """
        return prepare_prompt(
            prompt, encoder=self.encoder, probe=self._probe, max_frames=max_frames
        )

    def _probe(self, video: MediaFile) -> VideoInfo:
        return self._readers.probe(SharedFile(video.data), video.name)

    def add(self, prepared: PreparedPrompt, sampling: SamplingParams) -> int:
        """Queue a request; returns its number.

        Raises:
            DataError: it can never be answered: it is longer than the context or the cache.
            ConfigError: its adapter is not here.
        """
        if prepared.tokens >= self.max_context:
            raise DataError(
                f"the prompt has {prepared.tokens} tokens; with an answer at most "
                f"{self.max_context} are possible"
            )
        check_ids(prepared.document.input_ids, rows=self.recipe.model.language.vocab_size)
        width = max(sampling.n, sampling.num_beams)
        if width > self.options.max_running:
            raise DataError(
                f"{width} answers at a time are asked for; at most {self.options.max_running} are "
                "possible"
            )
        # The length limit is lowered here once, so that the scheduler can reserve blocks for the
        # longest possible outputs and never has to preempt a request.
        room = min(
            self.max_context - prepared.tokens,
            self._scheduler.longest_answer(prepared.tokens, sampling),
        )
        if room < 1:
            raise DataError(
                f"a prompt of {prepared.tokens} tokens with {width} answers at a time takes more "
                f"than the whole cache, which has {self.cache_tokens} tokens"
            )
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        keys = prepared.block_keys(
            self.layout.block_tokens, rows_per_tile=self.encoder.vision.image_token_length
        )
        request = Request(
            number=next(self._numbers),
            prepared=prepared,
            sampling=sampling,
            keys=keys,
            adapter=self.adapters.number_of(prepared.adapter),
        )
        self._outputs.open(request)
        self._requests[request.number] = request
        self._scheduler.add(request)
        return request.number

    def cancel(self, number: int) -> None:
        """End a request's answers; their last deltas come with the next step."""
        # The request may have ended and been forgotten.
        if number in self._requests:
            self._ended_early += self._outputs.cancel(self._requests[number])

    def idle(self) -> None:
        """Send an empty step. Call it regularly while there is no work: without steps, the
        other ranks would assume that this one has died."""
        self._execute(SchedulerOutput())

    def step(self) -> list[OutputDelta]:
        """Run one forward pass, and return what it adds to answers.

        Raises:
            EngineError: the engine cannot continue.
        """
        deltas = self._ended_early
        self._ended_early = []
        step = self._scheduler.next_step()
        if step is None:
            return deltas
        return deltas + self._process(step, self._execute(step))

    def usage(self, number: int) -> Usage:
        """Tokens of a request, also after its end until `forget`."""
        return self._requests[number].usage

    def forget(self, number: int) -> None:
        """Drop a request that has ended, and whose usage is not asked for any longer."""
        self._totals += self._requests.pop(number).usage

    def statistics(self) -> EngineStatistics:
        """Current load, and totals since the start."""
        counts = self._scheduler.counts
        totals = sum((request.usage for request in self._requests.values()), start=self._totals)
        return EngineStatistics(
            running=counts.running,
            waiting=counts.waiting,
            cache_tokens=self.cache_tokens,
            cache_tokens_used=self._pool.used * self.layout.block_tokens,
            prompt_tokens_total=totals.prompt_tokens,
            cached_tokens_total=totals.cached_tokens,
            completion_tokens_total=totals.completion_tokens,
        )

    def generate(
        self, prompts: Sequence[Prompt], *, sampling: SamplingParams
    ) -> list[CompletionOutput]:
        """Answer prompts, `sampling.n` times each, in order.

        Raises:
            DataError: a prompt cannot be used.
        """
        prepared = [self.prepare(prompt) for prompt in prompts]
        numbers: list[int] = []
        try:
            for prompt in prepared:
                numbers.append(self.add(prompt, sampling))
            deltas: list[OutputDelta] = []
            while self.has_work:
                deltas += self.step()
        finally:
            # Also after an error: blocks of requests that nobody reads would stay reserved.
            for number in numbers:
                self.cancel(number)
                self.forget(number)
            self._ended_early = []
        return [
            join_deltas(deltas, request=number, choice=choice)
            for number in numbers
            for choice in range(sampling.n)
        ]

    def stream(self, prompt: Prompt, *, sampling: SamplingParams) -> Iterator[OutputDelta]:
        """Stream the answers to one prompt from an engine that has no other requests.

        Closing the iterator cancels what is left.

        Raises:
            DataError: the prompt cannot be used.
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
        """Make `serve_as_worker` return on the other ranks, and release what this one holds."""
        if not self._closed:
            self._closed = True
            self._execute(SchedulerOutput(close=True))
            self._leave()

    def serve_as_worker(self) -> None:
        """Execute rank 0's steps until it closes.

        Raises:
            EngineError: rank 0 is gone.
        """
        while not (step := self.receive_step()).close:
            with lost_rank_as_engine_error():
                self.worker.execute(step)
        self._leave()

    def on_lost_rank(self, callback: Callable[[EngineError], None]) -> None:
        """Have `callback` called when another rank is gone.

        Any thread may call it, since a step may be waiting for that rank inside a kernel.
        """
        self._ranks.on_loss(callback)

    def _leave(self) -> None:
        self._ranks.close()
        self.worker.close()

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.encoder.chat.stop_ids

    def _execute(self, step: SchedulerOutput) -> StepResult:
        # Sent with the step: one message for each step keeps the bookkeeping of all ranks equal.
        changes = self._scheduler.take_changes()
        step = dataclasses.replace(
            step,
            finished=changes.finished,
            new=changes.new,
            block_tables=changes.block_tables,
            adapters=changes.adapters,
            copy_blocks=changes.copy_blocks,
            prefetch=changes.prefetch,
        )
        with lost_rank_as_engine_error():
            self._ranks.send(step)
            return self.worker.execute(step)

    def receive_step(self) -> SchedulerOutput:
        """Receive rank 0's next step.

        Raises:
            EngineError: rank 0 is gone.
        """
        return self._ranks.receive()

    def _process(self, step: SchedulerOutput, result: StepResult) -> list[OutputDelta]:
        self._scheduler.note_ready(result.ready)
        if result.logits is None:
            return []
        return self._outputs.process(step, result.logits, failed=result.failed)
