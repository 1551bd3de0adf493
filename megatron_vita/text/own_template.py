"""Prompts by the chat template of a tokenizer's folder, with the answers located in them.

The whole conversation is rendered at once and tokenized as transformers does it, so that ids are
those of `apply_chat_template`; only names of special tokens inside texts remain text. Answers,
which carry the loss, are the `{% generation %}` blocks. In a template without these, an answer
begins at the end of the rendering of what precedes it, with a generation prompt, and ends with the
template's end-of-turn token.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from megatron_vita.errors import ConfigError
from megatron_vita.text import jinja_environment
from megatron_vita.text.conversation import Turn
from megatron_vita.text.marks import names_pattern
from megatron_vita.text.media_tokens import MediaFormat
from megatron_vita.text.pieces import EncodedTurn
from megatron_vita.text.rendering import PLACEHOLDERS, Rendering
from megatron_vita.text.tokenizer_base import Tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Texts that occur in no template, to be found again in its rendering.
_QUESTION = "\N{WHITE SQUARE}"
_ANSWER = "\N{WHITE CIRCLE}"


@dataclass(frozen=True)
class OwnTemplate:
    """The chat template of a tokenizer; `date` (YYYY-MM-DD) replaces today's.

    Raises:
        ConfigError: the tokenizer has no template, or one with a syntax error.
    """

    tokenizer: Tokenizer
    media_format: type[MediaFormat]
    date: str = ""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "text.template is jinja, but the tokenizer has no chat template of its own: name "
                "a folder that has one, or another text.template"
            )
        jinja_environment.compile_template(self.tokenizer.chat_template)

    @property
    def writes_date(self) -> bool:
        """Return true if the rendering depends on the date."""
        return "strftime_now" in self.tokenizer.chat_template

    @property
    def end_of_turn(self) -> str:
        """Name of the special token that ends an answer; "" if there is none."""
        return _end_of_turn(self)

    def encode(self, turns: Sequence[Turn], *, first: int = 0) -> EncodedTurn:
        """Encode a conversation; answers carry loss. Errors count turns from turn `first`.

        Raises:
            DataError: the template refuses the conversation, omits or changes the text of a turn,
                or an answer cannot be located.
        """
        rendering = self._rendering(turns, first)
        text, blocks = rendering.with_blocks(add_generation_prompt=False)
        if _GENERATION.search(self.tokenizer.chat_template):
            blocks = [(start, self._past_end_of_turn(text, stop)) for start, stop in blocks]
            answers = rendering.answers_in(blocks)
        else:
            answers = rendering.find_answers(text, end_of_turn=self.end_of_turn)
        rendering.check_contents(text, answers)
        return rendering.pieces(text, answers)

    def prompt(self, turns: Sequence[Turn]) -> EncodedTurn:
        """Encode a conversation up to the beginning of the next answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        rendering = self._rendering(turns, 0)
        return rendering.pieces(rendering.render(add_generation_prompt=True), [])

    def _rendering(self, turns: Sequence[Turn], first: int) -> Rendering:
        return Rendering(
            turns,
            tokenizer=self.tokenizer,
            media_format=self.media_format,
            takes_lists=takes_lists(self),
            date=self.date,
            first=first,
        )

    def _past_end_of_turn(self, text: str, stop: int) -> int:
        """End of an answer in a generation block, extended by an end of turn that follows the
        block."""
        end = self.end_of_turn
        if end and text.startswith(end, stop):
            return stop + len(end)
        return stop

    def probe(self, *contents: str | list[dict[str, str]]) -> str:
        """Render a question and perhaps its answer; raises jinja2.TemplateError if refused."""
        roles = ("user", "assistant")
        return jinja_environment.render(
            self.tokenizer.chat_template,
            [{"role": roles[place], "content": content} for place, content in enumerate(contents)],
            names=self.tokenizer.named_tokens,
            add_generation_prompt=False,
            date=self.date,
        )


# Cached, since each probe renders the template, and every sample asks.
@functools.lru_cache(maxsize=16)
def _end_of_turn(template: OwnTemplate) -> str:
    try:
        rendered = template.probe(_QUESTION, _ANSWER)
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"the tokenizer's chat template does not render a question and its answer: {error}"
        ) from error
    # The first special token after the answer ends the turn, whatever follows it.
    after = rendered[rendered.rfind(_ANSWER) + 1 :]
    end = names_pattern(template.tokenizer.special_names).search(after)
    if end:
        return end.group()
    return ""


@functools.lru_cache(maxsize=16)
def takes_lists(template: OwnTemplate) -> bool:
    """Return true if the template writes a placeholder for an image in a list of parts."""
    parts = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    try:
        rendered = template.probe(parts)
    except jinja2.TemplateError:
        return False
    # A template that takes no lists prints the list in Python's notation, or drops it.
    written = [name for name, kind in PLACEHOLDERS.items() if kind == "image" and name in rendered]
    return len(written) == 1 and _QUESTION in rendered and "'type'" not in rendered
