"""Tokenizer and prompt format."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require

TEMPLATES = ("chatml", "plain")


@dataclass(kw_only=True)
class TextConfig:
    """How conversations become token ids."""

    tokenizer: str = described(
        "", "Folder of a Hugging Face tokenizer, or a SentencePiece .model file."
    )
    template: str = described("chatml", "Prompt format: chatml or plain.")

    def __post_init__(self) -> None:
        require(
            self.template in TEMPLATES,
            f"text.template is {self.template!r}; known templates: {', '.join(TEMPLATES)}",
        )
