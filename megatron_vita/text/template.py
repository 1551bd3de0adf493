"""The built-in prompt formats: each turn is framed and tokenized by itself."""

import functools
from dataclasses import dataclass

from megatron_vita.text.conversation import MediaPart, Turn
from megatron_vita.text.pieces import EncodedTurn, MediaPiece, append_ids
from megatron_vita.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """How a turn is framed: `{opening}{role}{after_role}` content `{closing}{after_closing}`.

    Opening and closing are special tokens; an empty closing stands for the token that ends raw
    text. `frames_all` false frames no turn but the assistant's, and without a role.
    """

    opening: str
    after_role: str
    closing: str
    after_closing: str
    frames_all: bool

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that it is made of."""
        return tuple(name for name in (self.opening, self.closing) if name)


TEMPLATES = {
    "chatml": Template(
        opening="<|im_start|>",
        after_role="\n",
        closing="<|im_end|>",
        after_closing="\n",
        frames_all=True,
    ),
    "plain": Template(opening="", after_role="", closing="", after_closing="", frames_all=False),
}


def frame_turn(turn: Turn, *, tokenizer: Tokenizer, template: Template) -> EncodedTurn:
    """A turn in token ids. Scored are what assistants say and the tokens that close their turns,
    but for turns without loss."""
    is_answer = turn.role == "assistant"
    scored = is_answer and turn.loss
    pieces: EncodedTurn = []
    opening = frame_opening(turn.role, tokenizer=tokenizer, template=template)
    append_ids(pieces, opening, loss=False)
    for part in turn.parts:
        if isinstance(part, MediaPart):
            pieces.append(MediaPiece(part.kind))
        else:
            append_ids(pieces, tokenizer.encode(part.text), loss=scored)
    if is_answer or template.frames_all:
        closing = [
            tokenizer.special_id(template.closing),
            *_framing(tokenizer, template.after_closing),
        ]
        append_ids(pieces, closing, loss=scored)
    return pieces


def frame_opening(role: str, *, tokenizer: Tokenizer, template: Template) -> list[int]:
    """The ids after which a role's words begin."""
    if not template.opening:
        return []
    return [
        tokenizer.special_id(template.opening),
        *_framing(tokenizer, role + template.after_role),
    ]


@functools.lru_cache(maxsize=64)
def _framing(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text that comes with each turn."""
    return tuple(tokenizer.encode(text))
