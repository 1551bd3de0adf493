"""Tokenizer and prompt format."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_vita.config.parsing.fields import Form, check_fields, described

TemplateName = Literal["chatml", "plain", "jinja"]
DATE = Form(pattern=r"(\d{4}-\d{2}-\d{2})?", name="YYYY-MM-DD")
TEMPLATES: tuple[TemplateName, ...] = get_args(TemplateName)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Tokenizer, prompt template and special tokens."""

    tokenizer: str = described(
        "", "Folder of a Hugging Face tokenizer, or a SentencePiece .model file."
    )
    template: TemplateName = described(
        "chatml",
        "Prompt format: chatml, plain, or jinja, the tokenizer folder's own chat template.",
    )
    media_format: Literal["long_vita", "internvl"] = described(
        "long_vita",
        "Placeholders of images and videos: long_vita (thumbnail first, a tag around each tile), "
        "or internvl (one tag around all tiles, thumbnail last; videos as 'Frame1: ...' lines).",
    )
    system: str = described(
        "",
        "System prompt of conversations without one; a jinja template may add its own.",
    )
    begin_token: str = described(
        "",
        "Token that begins documents and prompts; empty: none. A jinja template writes its own.",
    )
    end_token: str = described(
        "",
        "Token that ends raw text; empty: the first of <|endoftext|>, <|end_of_text|>, </s> that "
        "the tokenizer has, else its eos_token.",
    )
    stop_tokens: list[str] = described(
        [],
        "Further tokens that end an answer, beside the template's end of turn and the eos_token.",
    )
    date: str = described(
        "",
        "Date for jinja templates that write it, as 2026-01-31: required in training; empty in "
        "serving: today.",
        form=DATE,
    )

    def __post_init__(self) -> None:
        check_fields(self, "text.")
