"""Chat templates: from turns to token ids, and which of them carry the loss."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_vita.errors import ConfigError
from megatron_vita.text.conversation import MediaPart, Turn
from megatron_vita.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """How a turn is framed: `{opening}{role}{after_role}` content `{closing}{after_closing}`.

    Opening and closing are special tokens. `frames_all` false frames no turn but the assistant's,
    and without a role.
    """

    opening: str
    after_role: str
    closing: str
    after_closing: str
    frames_all: bool


TEMPLATES = {
    "chatml": Template(
        opening="<|im_start|>",
        after_role="\n",
        closing="<|im_end|>",
        after_closing="\n",
        frames_all=True,
    ),
    "plain": Template(
        opening="", after_role="", closing="<|endoftext|>", after_closing="", frames_all=False
    ),
}


@dataclass(frozen=True)
class TextPiece:
    """Token ids that follow one another, and whether their prediction is scored."""

    ids: list[int]
    loss: bool


@dataclass(frozen=True)
class MediaPiece:
    """The place of the next image or video; `kind` is "image" or "video". Its tokens are never
    scored."""

    kind: str


EncodedTurn = list[TextPiece | MediaPiece]


def encode_turns(turns: Iterable[Turn], tokenizer: Tokenizer, template: str) -> list[EncodedTurn]:
    """Each turn in token ids, tokenized independently of the others.

    Scored are what assistants say and the tokens that close their turns, but for turns without
    loss. No system turn is added.
    """
    frame = _template(template)
    return [_encode_turn(turn, tokenizer, frame) for turn in turns]


def generation_prompt(template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant's words begin."""
    return _opening(_template(template), tokenizer, "assistant")


def template_fingerprint(template: str) -> str:
    """Hexadecimal SHA-256 over the template's definition."""
    return hashlib.sha256(repr(_template(template)).encode()).hexdigest()


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"template is {name!r}; known templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _opening(frame: Template, tokenizer: Tokenizer, role: str) -> list[int]:
    if not frame.opening:
        return []
    return [tokenizer.special_id(frame.opening), *_framing(tokenizer, role + frame.after_role)]


@functools.lru_cache(maxsize=64)
def _framing(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text that comes with each turn."""
    return tuple(tokenizer.encode(text))


def _encode_turn(turn: Turn, tokenizer: Tokenizer, frame: Template) -> EncodedTurn:
    is_answer = turn.role == "assistant"
    scored = is_answer and turn.loss
    pieces: EncodedTurn = []
    _append(pieces, _opening(frame, tokenizer, turn.role), loss=False)
    for part in turn.parts:
        if isinstance(part, MediaPart):
            pieces.append(MediaPiece(part.kind))
        else:
            _append(pieces, tokenizer.encode(part.text), loss=scored)
    if is_answer or frame.frames_all:
        closing = [tokenizer.special_id(frame.closing), *_framing(tokenizer, frame.after_closing)]
        _append(pieces, closing, loss=scored)
    return pieces


def _append(pieces: EncodedTurn, ids: list[int], *, loss: bool) -> None:
    """Adds ids to the last piece if that is text of the same kind, so that a turn has as few pieces
    as it can."""
    if not ids:
        return
    last = pieces[-1] if pieces else None
    if isinstance(last, TextPiece) and last.loss == loss:
        last.ids.extend(ids)
    else:
        pieces.append(TextPiece(list(ids), loss))
