"""Rendering of one conversation by a chat template, and location of its answers."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from megatron_vita.errors import DataError
from megatron_vita.text import jinja_environment
from megatron_vita.text.assembly import Assembly
from megatron_vita.text.conversation import MediaPart, TextPart, Turn
from megatron_vita.text.marks import Marks, names_pattern
from megatron_vita.text.media_tokens import MediaFormat
from megatron_vita.text.pieces import EncodedTurn
from megatron_vita.text.tokenizer_base import Tokenizer

PLACEHOLDERS = {"<image>": "image", "<IMG_CONTEXT>": "image", "<video>": "video"}
"""Placeholders that templates which take contents as lists write for media."""


class Answer(NamedTuple):
    """Span of a trained answer in a rendering, and the index of its turn."""

    start: int
    stop: int
    turn: int


class Rendering:
    """A conversation as the messages of a template, with marks in the place of media.

    `first` is the index in the sample of the first turn, for error messages. Errors are DataErrors
    that name a turn.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        *,
        tokenizer: Tokenizer,
        media_format: type[MediaFormat],
        takes_lists: bool,
        date: str,
        first: int = 0,
    ) -> None:
        self._turns = turns
        self._tokenizer = tokenizer
        self._format = media_format
        self._takes_lists = takes_lists
        self._date = date
        self._first = first
        texts = [part.text for turn in turns for part in turn.parts if isinstance(part, TextPart)]
        # Absent from the template as well, whose own text becomes part of the rendering.
        self._marks = Marks.absent_from([tokenizer.chat_template, *texts])
        self._messages = [{"role": turn.role, "content": self._content(turn)} for turn in turns]
        self._trained = [
            i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.loss
        ]

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        parts = turn.parts
        has_media = any(isinstance(part, MediaPart) for part in parts)
        if turn.listed and has_media and self._takes_lists:
            return [self._listed(part) for part in parts]
        if turn.listed:
            parts = self._format.laid_out(parts)
        return "".join(self._marked(part) for part in parts)

    def _listed(self, part: TextPart | MediaPart) -> dict[str, str]:
        if isinstance(part, MediaPart):
            return {"type": part.kind}
        return {"type": "text", "text": self._marked(part)}

    def _marked(self, part: TextPart | MediaPart) -> str:
        if isinstance(part, MediaPart):
            return self._marks.of_medium(part.kind)
        return self._marks.guarded(part.text, _guarded_names(self._tokenizer))

    def render(self, turns: int | None = None, *, add_generation_prompt: bool) -> str:
        """Render the first `turns` turns, or all, without marks of generation blocks."""
        return self.with_blocks(turns, add_generation_prompt=add_generation_prompt)[0]

    def with_blocks(
        self, turns: int | None = None, *, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render as `render`; returns the text and the spans of its generation blocks."""
        try:
            rendered = jinja_environment.render(
                self._tokenizer.chat_template,
                self._messages[:turns],
                names=self._tokenizer.named_tokens,
                add_generation_prompt=add_generation_prompt,
                marks=(self._marks.opening, self._marks.closing),
                date=self._date,
            )
        except jinja2.TemplateError as error:
            shown = "messages"
            if turns is not None:
                shown = f"what comes before {self._name(turns)}"
            raise DataError(f"the tokenizer's chat template refuses {shown}: {error}") from error
        return self._marks.without_generation(rendered)

    def answers_in(self, blocks: Sequence[tuple[int, int]]) -> list[Answer]:
        """Trained answers among generation blocks, of which each answer must have one."""
        said = [turn for turn, message in enumerate(self._messages) if _is_answer(message)]
        if len(blocks) != len(said):
            raise DataError(
                f"the tokenizer's chat template has {len(blocks)} generation blocks for messages "
                f"with {len(said)} answers: one for each is needed"
            )
        found = [Answer(*block, turn) for block, turn in zip(blocks, said, strict=True)]
        return [answer for answer in found if self._turns[answer.turn].loss]

    def find_answers(self, text: str, *, end_of_turn: str) -> list[Answer]:
        """Locate trained answers by rendering what precedes each of them."""
        found: list[Answer] = []
        for turn in self._trained:
            # Some templates rewrite the history once a later turn is there: then the rendering up
            # to the answer is no prefix of the whole.
            before = self.render(turn, add_generation_prompt=True)
            if not text.startswith(before) or (found and found[-1].stop > len(before)):
                raise DataError(
                    f"{self._name(turn)}: the tokenizer's chat template writes what precedes this "
                    "answer differently once the answer is there, so that its beginning cannot "
                    "be found; "
                    'give it "loss": false'
                )
            stop = self._end_of_answer(text, len(before), turn, end_of_turn)
            found.append(Answer(len(before), stop, turn))
        return found

    def _end_of_answer(self, text: str, start: int, turn: int, end_of_turn: str) -> int:
        if end_of_turn:
            stop = text.find(end_of_turn, start)
            if stop >= 0:
                return stop + len(end_of_turn)
        else:
            # Without an end-of-turn token, the rendering up to this turn shows the end.
            upto = self.render(turn + 1, add_generation_prompt=False)
            if text.startswith(upto):
                return len(upto)
        raise DataError(
            f"{self._name(turn)}: the tokenizer's chat template writes no end of this answer that "
            "can be found"
        )

    def check_contents(self, text: str, answers: Sequence[Answer]) -> None:
        """Check that the rendering has the text of each turn, in order, and each answer its own.

        White space is ignored. Answers without loss may lose what a template omits from the
        history.

        Raises:
            DataError: naming the turn whose text is missing.
        """
        said = [
            turn
            for turn, message in enumerate(self._messages)
            if turn in self._trained or not _is_answer(message)
        ]
        self._check_order(said, text)
        for start, stop, turn in answers:
            self._check_order([turn], text[start:stop])

    def _check_order(self, turns: Sequence[int], text: str) -> None:
        # Templates strip and add white space; all else must be there.
        squeezed = _squeezed(text)
        place = 0
        for turn in turns:
            for said in map(_squeezed, _texts(self._messages[turn]["content"])):
                place = squeezed.find(said, place)
                if place < 0:
                    raise DataError(
                        f"{self._name(turn)}: the tokenizer's chat template leaves out or changes "
                        "what this turn says, as some do with the reasoning of answers that are "
                        "not the last; give such "
                        'answers "loss": false'
                    )
                place += len(said)

    def pieces(self, text: str, answers: Sequence[Answer]) -> EncodedTurn:
        """Encode a rendering; answers carry loss.

        Raises:
            DataError: media are missing, or an answer shares a token with the text around it.
        """
        assembly = Assembly(self._tokenizer, self._marks, video_opening=self._format.video_opening)
        position = 0
        for start, stop, turn in answers:
            self._assemble(assembly, text[position:start], None)
            self._assemble(assembly, text[start:stop], turn)
            position = stop
        self._assemble(assembly, text[position:], None)
        if (shared := assembly.end()) is not None:
            raise DataError(
                f"{self._name(shared)}: this answer shares a token with what the tokenizer's chat "
                "template writes around it: take the white space from its beginning and end"
            )
        self._check_media(assembly.media)
        return assembly.pieces

    def _assemble(self, assembly: Assembly, text: str, turn: int | None) -> None:
        """Add a part of the rendering, which belongs to the answer of `turn` or to none."""
        position = 0
        for found in _pattern(self._tokenizer, self._marks, self._takes_lists).finditer(text):
            assembly.add_text(text[position : found.start()], turn)
            if kind := self._medium(found.group()):
                assembly.add_medium(kind, turn)
            else:
                assembly.add_special(found.group(), turn)
            position = found.end()
        assembly.add_text(text[position:], turn)

    def _medium(self, name: str) -> str:
        """Kind of medium of a mark or a placeholder; "" for a special token."""
        if name in (self._marks.image, self._marks.video):
            if name == self._marks.image:
                return "image"
            return "video"
        # A template that takes lists writes its own placeholders for media.
        if self._takes_lists:
            return PLACEHOLDERS.get(name, "")
        return ""

    def _check_media(self, written: list[str]) -> None:
        wanted = [
            part.kind for turn in self._turns for part in turn.parts if isinstance(part, MediaPart)
        ]
        if written != wanted:
            raise DataError(
                f"messages has media {wanted}, of which the tokenizer's chat template writes "
                f"{written}: put them into texts by the tags <image> and <video>"
            )

    def _name(self, turn: int) -> str:
        return f"messages[{turn - self._first}]"


@functools.lru_cache(maxsize=16)
def _guarded_names(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Pattern of the names that must not stay intact in texts."""
    return names_pattern([*tokenizer.special_names, *PLACEHOLDERS])


@functools.lru_cache(maxsize=64)
def _pattern(tokenizer: Tokenizer, marks: Marks, takes_lists: bool) -> re.Pattern[str]:
    """Pattern of everything in a rendering that is not ordinary text."""
    names = [*tokenizer.special_names, marks.image, marks.video]
    if takes_lists:
        names += PLACEHOLDERS
    return names_pattern(names)


def _is_answer(message: dict[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _texts(content: str | list[dict[str, str]]) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def _squeezed(text: str) -> str:
    """Remove white space from a text."""
    return "".join(text.split())
