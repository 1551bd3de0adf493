"""Built-in prompt templates: each turn is framed and encoded by itself."""

import functools
from dataclasses import dataclass

from megatron_vita.text.conversation import MediaPart, Turn
from megatron_vita.text.pieces import EncodedTurn, MediaPiece, append_ids
from megatron_vita.text.tokenizer_base import Tokenizer


@dataclass(frozen=True)
class Template:
    """Frame of a turn: `{opening}{role}{after_role}` content `{closing}{after_closing}`.

    Opening and closing are special tokens; an empty closing means the token that ends raw text.
    With `frames_all` false only the assistant's turns are framed, and without a role.
    """

    opening: str
    after_role: str
    closing: str
    after_closing: str
    frames_all: bool

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens of the frame."""
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
    """Encode a turn; content and closing of an assistant's turn carry loss if `turn.loss`."""
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
    """Ids before the content of a role's turn."""
    if not template.opening:
        return []
    return [
        tokenizer.special_id(template.opening),
        *_framing(tokenizer, role + template.after_role),
    ]


# Cached, since the same few texts frame every turn.
@functools.lru_cache(maxsize=64)
def _framing(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of the constant text of a frame."""
    return tuple(tokenizer.encode(text))
