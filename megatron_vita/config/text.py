"""Tokenizer and prompt format."""

import re
from dataclasses import dataclass

from megatron_vita.config.fields import described, require

TEMPLATES = ("chatml", "plain", "jinja")
MEDIA_FORMATS = ("long_vita", "internvl")


@dataclass(kw_only=True)
class TextConfig:
    """How conversations become token ids."""

    tokenizer: str = described(
        "", "Folder of a Hugging Face tokenizer, or a SentencePiece .model file."
    )
    template: str = described(
        "chatml",
        "Prompt format: chatml, plain, or jinja, the tokenizer folder's own chat template.",
    )
    media_format: str = described(
        "long_vita",
        "Placeholders of images and videos: long_vita (thumbnail first, a tag around each tile), or "
        "internvl (one tag around all tiles, thumbnail last; videos as 'Frame1: ...' lines).",
    )
    system: str = described(
        "",
        "System turn put before conversations that begin with none; a jinja template may add its own.",
    )
    begin_token: str = described(
        "",
        "Token that begins documents and prompts; a jinja template writes its own. None if empty.",
    )
    end_token: str = described(
        "",
        "Token that ends raw text; if empty the first of <|endoftext|>, <|end_of_text|>, </s> that the "
        "tokenizer has, else its eos_token.",
    )
    stop_tokens: list[str] = described(
        [], "Tokens that end an answer, beside the template's end of turn and the tokenizer's end."
    )
    date: str = described(
        "",
        "Today for a jinja template that writes it, as 2026-01-31: needed in training; in serving the "
        "real one if empty.",
    )

    def __post_init__(self) -> None:
        require(
            self.template in TEMPLATES,
            f"text.template is {self.template!r}; known templates: {', '.join(TEMPLATES)}",
        )
        require(
            self.media_format in MEDIA_FORMATS,
            f"text.media_format is {self.media_format!r}; known: {', '.join(MEDIA_FORMATS)}",
        )
        require(
            not self.date or re.fullmatch(r"\d{4}-\d{2}-\d{2}", self.date) is not None,
            f"text.date is {self.date!r}: YYYY-MM-DD is needed",
        )
