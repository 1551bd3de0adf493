"""A published family as transformers reads it, and our format of it."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.pieces import MediaPiece, TextPiece
from tests.text.published import INTERNVL_SYSTEM

DATE = "2026-01-31"
SYSTEM = {"role": "system", "content": " Be kind.\n"}
TALK = [
    {"role": "user", "content": "What is this? \n"},
    {"role": "assistant", "content": "A cat.\n\n  it sat on the mat"},
    {"role": "user", "content": " sure?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "日本語 é"},
    {"role": "assistant", "content": "Frame1: hello"},
]


class Published(NamedTuple):
    """A family's folder as transformers reads it, and our format of it."""

    name: str
    theirs: PreTrainedTokenizerFast
    chat: ChatFormat

    def rendered(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        """transformers' rendering, on the day of `DATE`."""
        if self.name == "internvl-chat" and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": INTERNVL_SYSTEM}, *messages]
        text = self.theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        if self.name == "llama3.2":
            head, _, rest = text.partition("Today Date: ")
            text = f"{head}Today Date: 31 Jan 2026{rest[len('31 Jan 2026') :]}"
        return text

    def ids(self, messages: list[dict[str, Any]], *, prompt: bool) -> list[int]:
        """transformers' ids."""
        return self.theirs(self.rendered(messages, prompt=prompt), add_special_tokens=False)[
            "input_ids"
        ]


def text_ids(turns: list[list[TextPiece | MediaPiece]], *, scored: bool | None = None) -> list[int]:
    pieces = [piece for turn in turns for piece in turn if isinstance(piece, TextPiece)]
    return [i for piece in pieces if scored in (None, piece.loss) for i in piece.ids]
