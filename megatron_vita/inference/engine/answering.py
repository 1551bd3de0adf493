"""The answers of one request: what is drawn next for each, and which sequence of the cache
continues it."""

import torch
from torch import Tensor

from megatron_vita.inference.engine.scheduler import Request, Scheduler, Sequence
from megatron_vita.inference.generation.beams import BeamSearch
from megatron_vita.inference.generation.choice_state import AnswerState
from megatron_vita.inference.generation.sampling import Draw
from megatron_vita.inference.requests import AnswerPiece, FinishReason, ScoredToken
from megatron_vita.text.tokenizer import Tokenizer


class Answering:
    """Follows a request from its prompt to the last piece of its last answer."""

    def __init__(
        self,
        request: Request,
        *,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        rows_per_tile: int,
    ) -> None:
        self.request, self.scheduler, self.tokenizer = request, scheduler, tokenizer
        self.end_ids, self.rows_per_tile = end_ids, rows_per_tile
        sampling = request.sampling
        self.states = [
            AnswerState(sampling, request=request.number, choice=choice, tokenizer=tokenizer)
            for choice in range(sampling.n)
        ]
        self.beams = BeamSearch(sampling, end_ids=end_ids) if sampling.num_beams > 1 else None
        self._sequence_of: dict[int, Sequence] = {}  # of each answer under way

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(state.ids) for state in self.states)

    def draws(self, logits: Tensor) -> list[tuple[int, Draw]]:
        """What is to be drawn from this request's logits [rows, V]: the row, and how."""
        if not self.request.running:  # all answers begin after the prompt's last token
            prompt_ids = torch.from_numpy(self.request.prepared.document.input_ids)
            for state in self.states:
                state.see_prompt(prompt_ids, vocab_size=logits.shape[1], device=logits.device)
            return [(0, state.draw()) for state in self.states]
        return [(row, self.states[choice].draw()) for row, choice in enumerate(self._sequence_of)]

    def take(self, scored: list[ScoredToken]) -> list[AnswerPiece]:
        """The tokens that were drawn, in the order of `draws`."""
        if not self.request.running:
            self.scheduler.start_answers(self.request, len(self.states))
            self._sequence_of = dict(enumerate(self.request.sequences))
        pieces = []
        for choice, token in zip(list(self._sequence_of), scored, strict=True):
            piece = self.states[choice].take(token, end_ids=self.end_ids)
            if piece.finish is None:
                self._sequence_of[choice].next_token = token.chosen.token_id
            else:
                self._end_answer(choice)
            pieces.append(piece)
        return pieces

    def remember_prompt(self) -> None:
        """What is computed of the prompt can be shared with other requests."""
        self.scheduler.remember(self.request.sequences[0], self.request.keys)

    def cancel(self) -> list[AnswerPiece]:
        """Ends what is under way."""
        return self._end_all([state.cancel() for state in self.states if state.finish is None])

    def fail(self, error: str, *, finish: FinishReason = "error") -> list[AnswerPiece]:
        """Ends what is under way because of an error, which whoever asked is told."""
        if finish == "model_error":  # what was computed for it may be what is wrong
            for sequence in self.request.sequences:
                self.scheduler.pool.forget(sequence.blocks)
        return self._end_all(
            [state.fail(error, finish=finish) for state in self.states if state.finish is None]
        )

    def _end_all(self, pieces: list[AnswerPiece]) -> list[AnswerPiece]:
        self._sequence_of.clear()
        self.scheduler.end(self.request)
        return pieces

    def _end_answer(self, choice: int) -> None:
        sequence = self._sequence_of.pop(choice)
        keys = self.request.prepared.block_keys(
            self.scheduler.layout.block_tokens,
            rows_per_tile=self.rows_per_tile,
            said=self.states[choice].ids,
        )
        self.scheduler.remember(sequence, keys)
        self.scheduler.end_sequence(self.request, sequence)

    def advance_beams(self, logits: Tensor) -> list[AnswerPiece]:
        """Beam search goes one token further, on logits [W, V] of the live beams. LogitsError as
        from `draw_tokens`."""
        assert self.beams is not None
        self.beams.advance(logits)
        if not self.request.running:
            self.scheduler.start_answers(self.request, 1)
        if self.beams.done:
            found = self.beams.results(len(self.states))
            pieces = [
                state.take_beam(answer) for state, answer in zip(self.states, found, strict=False)
            ]
            return self._end_all(pieces + [state.cut() for state in self.states[len(found) :]])
        self._continue_beams(self.beams.parents, self.beams.tokens)
        return []

    def _continue_beams(self, parents: list[int], tokens: list[int]) -> None:
        """The sequences of the new beams: the first child of a beam goes on with its parent's,
        others with copies."""
        old = list(self.request.sequences)
        new: list[Sequence] = []
        for parent in parents:
            first = old[parent] not in new
            new.append(old[parent] if first else self.scheduler.fork(self.request, old[parent]))
        for sequence in old:
            if sequence not in new:
                self.scheduler.end_sequence(self.request, sequence)
        for sequence, token in zip(new, tokens, strict=True):
            sequence.next_token = token
        self.request.sequences = new
