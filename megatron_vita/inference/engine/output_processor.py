"""From a step's logits to tokens and text: samples for each request, advances its sequences, and
ends answers."""

import itertools
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vita.errors import LogitsError
from megatron_vita.inference.engine.request import Request, Sequence
from megatron_vita.inference.engine.scheduler import Scheduler
from megatron_vita.inference.generation.beams import BeamSearch
from megatron_vita.inference.generation.choice_state import ChoiceState
from megatron_vita.inference.generation.sampling import SamplingRow, sample_tokens
from megatron_vita.inference.requests.scheduler_output import SchedulerOutput
from megatron_vita.inference.requests.types import (
    CompletionOutput,
    FinishReason,
    OutputDelta,
    ScoredToken,
)
from megatron_vita.text.tokenizer_base import Tokenizer


class _RowToSample(NamedTuple):
    """A row of a step's logits that one choice of a request is sampled from."""

    request: Request
    row: int
    how: SamplingRow


class OutputProcessor:
    """Applies what the ranks computed to the requests of a scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        rows_per_tile: int,
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._rows_per_tile = rows_per_tile

    def open(self, request: Request) -> None:
        """Give a new request the state of its answers."""
        sampling = request.sampling
        request.choices = [
            ChoiceState(sampling, request=request.number, choice=choice, tokenizer=self._tokenizer)
            for choice in range(sampling.n)
        ]
        if sampling.num_beams > 1:
            request.beams = BeamSearch(sampling, end_ids=self._end_ids)

    def process(
        self, step: SchedulerOutput, logits: Tensor, *, failed: dict[int, str]
    ) -> list[OutputDelta]:
        """Apply the results of a step.

        Args:
            logits: [rows, V], one row for each prompt that ends in this step, or for each decoded
                token.
            failed: reasons by sequence, for those whose tiles could not be decoded.

        Returns:
            The output deltas of this step.
        """
        # Requests that fail are taken out of the owners, and their rows are skipped.
        owners = {s.number: r for r in self._scheduler.admitted for s in r.sequences}
        deltas: list[OutputDelta] = []
        for sequence, reason in failed.items():
            deltas += self.fail(owners.pop(sequence), reason)
        # Cached chunk by chunk: other requests can reuse the beginning of a long prompt before its
        # end is computed.
        for chunk in step.prefill:
            if chunk.sequence in owners:
                request = owners[chunk.sequence]
                self._scheduler.cache_blocks(request.sequences[0], request.keys)
        ended = [chunk.sequence for chunk in step.prefill if chunk.ends_prompt]
        rows = ended or [sequence for sequence, _, _ in step.decode]
        # Rows that pad the vocabulary are no tokens.
        tokens_only = logits[:, : self._tokenizer.vocab_size]
        return deltas + self._sample(tokens_only, [owners.get(sequence) for sequence in rows])

    def cancel(self, request: Request) -> list[OutputDelta]:
        """End the outputs of a cancelled request."""
        return self._end_all(
            request, [choice.cancel() for choice in request.choices if choice.finish is None]
        )

    def fail(
        self, request: Request, error: str, *, finish: FinishReason = "error"
    ) -> list[OutputDelta]:
        """End the outputs of a request with an error message for its client."""
        # NaN in the cache would spread to every request that shares its blocks.
        if finish == "model_error":
            self._scheduler.invalidate(request)
        return self._end_all(
            request,
            [
                choice.fail(error, finish=finish)
                for choice in request.choices
                if choice.finish is None
            ],
        )

    def _sample(self, logits: Tensor, owners: list[Request | None]) -> list[OutputDelta]:
        """Advance the owners of the rows of logits [rows, V]; rows of a request are adjacent. None
        owns rows of requests that have just failed."""
        deltas: list[OutputDelta] = []
        to_sample: list[_RowToSample] = []
        for request, group in itertools.groupby(range(len(owners)), key=lambda row: owners[row]):
            rows = list(group)
            if request is None:
                continue
            own = logits[rows[0] : rows[-1] + 1]
            if request.beams is None:
                to_sample += self._rows_to_sample(request, own, first_row=rows[0])
                continue
            try:
                deltas += self._advance_beams(request, request.beams, own)
            except LogitsError as error:
                deltas += self.fail(request, str(error), finish="model_error")
        return deltas + self._sample_rows(logits, to_sample)

    def _rows_to_sample(
        self, request: Request, logits: Tensor, *, first_row: int
    ) -> list[_RowToSample]:
        """The rows of a request's logits [rows, V], which begin at `first_row` of the step's."""
        if request.running:
            return [
                _RowToSample(request, first_row + row, request.choices[choice].sampling_row())
                for row, choice in enumerate(request.sequence_of_choice)
            ]
        # All answers begin from the one row after the prompt's last token.
        prompt_ids = torch.from_numpy(request.prepared.document.input_ids)
        for choice in request.choices:
            choice.set_prompt(prompt_ids, vocab_size=logits.shape[1], device=logits.device)
        return [
            _RowToSample(request, first_row, choice.sampling_row()) for choice in request.choices
        ]

    def _sample_rows(self, logits: Tensor, rows: Rows[_RowToSample]) -> list[OutputDelta]:
        """Sample one token for each row; requests whose logits are not finite fail."""
        try:
            scored = sample_tokens(logits[[row.row for row in rows]], [row.how for row in rows])
        except LogitsError as error:
            # A request with non-finite logits fails alone; the rest is sampled again without its
            # rows.
            wrong = list(dict.fromkeys(rows[row].request for row in error.rows))
            failed: list[OutputDelta] = []
            for request in wrong:
                failed += self.fail(request, str(error), finish="model_error")
            rest = [row for row in rows if row.request not in wrong]
            return failed + self._sample_rows(logits, rest)
        deltas: list[OutputDelta] = []
        pairs = zip(rows, scored, strict=True)
        for request, group in itertools.groupby(pairs, key=lambda pair: pair[0].request):
            deltas += self._append_tokens(request, [token for _, token in group])
        return deltas

    def _append_tokens(self, request: Request, tokens: list[ScoredToken]) -> list[OutputDelta]:
        """Add one token to each unfinished choice, in their order."""
        if not request.running:
            self._scheduler.start_decoding(request, len(request.choices))
            request.sequence_of_choice = dict(enumerate(request.sequences))
        deltas = []
        # A list, since finished choices are removed inside the loop.
        for choice, token in zip(list(request.sequence_of_choice), tokens, strict=True):
            delta = request.choices[choice].append(token, end_ids=self._end_ids)
            if delta.finish is None:
                request.sequence_of_choice[choice].next_token = token.chosen.token_id
            else:
                self._finish_choice(request, choice)
            deltas.append(delta)
        return deltas

    def _finish_choice(self, request: Request, choice: int) -> None:
        """Cache the blocks of a finished answer, which a next turn may begin with, and free them."""
        sequence = request.sequence_of_choice.pop(choice)
        keys = request.prepared.block_keys(
            self._scheduler.layout.block_tokens,
            rows_per_tile=self._rows_per_tile,
            said=request.choices[choice].ids,
        )
        self._scheduler.cache_blocks(sequence, keys)
        self._scheduler.finish_sequence(request, sequence)

    def _end_all(self, request: Request, deltas: list[OutputDelta]) -> list[OutputDelta]:
        request.sequence_of_choice.clear()
        self._scheduler.finish(request)
        return deltas

    def _advance_beams(
        self, request: Request, beams: BeamSearch, logits: Tensor
    ) -> list[OutputDelta]:
        """Advance beam search by one token, on logits [W, V] of the live beams.

        Raises:
            LogitsError: as `sample_tokens`.
        """
        beams.advance(logits)
        if not request.running:
            self._scheduler.start_decoding(request, 1)
        if not beams.done:
            self._reorder_beams(request, beams.parents, beams.tokens)
            return []
        found = beams.results(len(request.choices))
        deltas = [
            choice.append_beam(answer)
            for choice, answer in zip(request.choices, found, strict=False)
        ]
        deltas += [choice.stop_at_length() for choice in request.choices[len(found) :]]
        return self._end_all(request, deltas)

    def _reorder_beams(self, request: Request, parents: list[int], tokens: list[int]) -> None:
        """Give each new beam a sequence: the first child of a beam takes over its parent's, further
        ones get forks."""
        old = list(request.sequences)
        new: list[Sequence] = []
        for parent in parents:
            sequence = old[parent]
            new.append(self._scheduler.fork(request, sequence) if sequence in new else sequence)
        # After all forks, which share the blocks of beams that end here.
        for sequence in old:
            if sequence not in new:
                self._scheduler.finish_sequence(request, sequence)
        for sequence, token in zip(new, tokens, strict=True):
            sequence.next_token = token
        request.sequences = new


def join_deltas(deltas: Rows[OutputDelta], *, request: int, choice: int) -> CompletionOutput:
    """The whole answer of one choice of a request, among the deltas of many."""
    own = [delta for delta in deltas if (delta.request, delta.choice) == (request, choice)]
    finish = own[-1].finish
    assert finish is not None
    return CompletionOutput(
        text="".join(delta.text for delta in own),
        token_ids=[token for delta in own for token in delta.token_ids],
        finish=finish,
        scores=[score for delta in own for score in delta.scores],
        error=own[-1].error,
    )
