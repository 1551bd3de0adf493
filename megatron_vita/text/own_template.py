"""Prompts by the chat template of a tokenizer's own folder, with the answers found in them.

The whole conversation is rendered at once and tokenized as transformers does it, so that ids are
those of `apply_chat_template`; only names of special tokens that texts hold stay text. Answers,
which carry the loss, are what `{% generation %}` blocks enclose. In a template without these, an
answer begins where the rendering of what precedes it, with a generation prompt, ends; it ends with
the template's end-of-turn token.
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
from megatron_vita.text.tokenizer import Tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# words that no template knows
_QUESTION = "\N{WHITE SQUARE}"
_ANSWER = "\N{WHITE CIRCLE}"


@dataclass(frozen=True)
class OwnTemplate:
    """The chat template of a tokenizer. `date` is today, if not the real one (YYYY-MM-DD).

    ConfigError if the tokenizer has none, or one that is not valid.
    """

    tokenizer: Tokenizer
    media_format: type[MediaFormat]
    date: str = ""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "text.template is jinja, but the tokenizer has no chat template of its own: name a folder "
                "that has one, or another text.template"
            )
        jinja_environment.compile_template(self.tokenizer.chat_template)

    @property
    def writes_date(self) -> bool:
        """Whether what it renders depends on the day."""
        return "strftime_now" in self.tokenizer.chat_template

    @property
    def end_of_turn(self) -> str:
        """The special token that ends an answer; "" if none does."""
        return _end_of_turn(self)

    def encode(self, turns: Sequence[Turn], *, first: int = 0) -> EncodedTurn:
        """A conversation in token ids, answers scored; `first` is the number of its first turn that
        errors name.

        Raises:
            DataError: the template refuses the conversation, leaves out or changes what a turn
                says, or an answer cannot be told from what stands around it.
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
        """A conversation in token ids, up to where the assistant speaks next. DataError if the
        template refuses it."""
        rendering = self._rendering(turns, 0)
        return rendering.pieces(rendering.render(add_generation_prompt=True), [])

    def _rendering(self, turns: Sequence[Turn], first: int) -> Rendering:
        return Rendering(
            turns,
            tokenizer=self.tokenizer,
            media_format=self.media_format,
            takes_lists=_takes_lists(self),
            date=self.date,
            first=first,
        )

    def _past_end_of_turn(self, text: str, stop: int) -> int:
        """Where an answer ends that a generation block encloses, perhaps without its end of turn."""
        end = self.end_of_turn
        if end and text.startswith(end, stop):
            return stop + len(end)
        return stop

    def probe(self, *contents: str | list[dict[str, str]]) -> str:
        """The rendering of a question and perhaps its answer. jinja2.TemplateError if it is
        refused."""
        roles = ("user", "assistant")
        return jinja_environment.render(
            self.tokenizer.chat_template,
            [{"role": roles[place], "content": content} for place, content in enumerate(contents)],
            names=self.tokenizer.named_tokens,
            add_generation_prompt=False,
            date=self.date,
        )


@functools.lru_cache(maxsize=16)
def _end_of_turn(template: OwnTemplate) -> str:
    try:
        rendered = template.probe(_QUESTION, _ANSWER)
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"the tokenizer's chat template does not render a question and its answer: {error}"
        ) from error
    after = rendered[rendered.rfind(_ANSWER) + 1 :]
    end = names_pattern(template.tokenizer.special_names).search(after)
    if end:
        return end.group()
    return ""


@functools.lru_cache(maxsize=16)
def _takes_lists(template: OwnTemplate) -> bool:
    """Whether a template writes a placeholder for an image in a content that is a list of parts."""
    parts = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    try:
        rendered = template.probe(parts)
    except jinja2.TemplateError:
        return False
    written = [name for name, kind in PLACEHOLDERS.items() if kind == "image" and name in rendered]
    return len(written) == 1 and _QUESTION in rendered and "'type'" not in rendered
