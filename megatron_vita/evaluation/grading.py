"""Grading of answers against references."""

import re
import string
import unicodedata
from collections.abc import Callable

from megatron_vita.registry import Registry

_ARTICLES = {"a", "an", "the"}
_LETTER_ALONE = re.compile(r"\(?([A-Z])\)?[.:]?", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:,](?=\s))")
_LETTER_NAMED = re.compile(
    r"""\b(?i:(?:answer|option|choice)(?:\s+is)?|it(?:\s+is|'s))\s*:?\s*
    (?: \(([A-Za-z])\) | ([A-Za-z])(?=[.)]?\s*$) | ([B-HJ-Z])(?![\w'])
      # A and I may be words
      | ([AI])(?![\w'])(?!\s+(?!or\b|and\b|but\b|as\b|because\b|since\b)[a-z]) )""",
    re.VERBOSE,
)


def same_digits(answer: str, reference: str) -> bool:
    """Tell whether an answer has the reference's digits and no others, in any script and
    grouping."""
    # Without the last comparison, an answer without digits would equal a reference without any.
    return digits_of(answer) == digits_of(reference) != ""


def digits_of(text: str) -> str:
    """Return all digits of a text in order, as 0-9."""
    return "".join(
        str(digit) for char in text if (digit := unicodedata.decimal(char, None)) is not None
    )


def normalized(text: str) -> str:
    """Normalize case, articles, punctuation, spaces and letter width.

    Punctuation inside a word stays (3.5, don't). A text that would become empty is kept.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = [word.strip(string.punctuation) for word in plain.split()]
    kept = [word for word in words if word and word not in _ARTICLES]
    # A reference such as "A" or "+" consists of nothing else.
    return " ".join(kept) or " ".join(plain.split())


def exact_match(answer: str, reference: str) -> bool:
    """Tell whether both are equal when normalized."""
    return normalized(answer) == normalized(reference)


def contains(answer: str, reference: str) -> bool:
    """Tell whether the answer contains the reference's words in a row, both normalized."""
    # Spaces around both: "art" must not be found in "start".
    wanted = normalized(reference)
    return bool(wanted) and f" {wanted} " in f" {normalized(answer)} "


def same_letter(answer: str, reference: str) -> bool:
    """Tell whether both choose the same option of a multiple choice."""
    chosen = choice_letter(answer)
    return chosen is not None and chosen == choice_letter(reference)


def choice_letter(text: str) -> str | None:
    """Return the letter of the option that an answer chooses; None if it names none, or several.

    Recognized are a letter alone (B, (B), B.), a letter that opens the answer (B) a cat, B. a cat),
    and a named one (the answer is B, Option: (B)). A word that happens to be a letter, as in "A
    cat", is not.
    """
    text = text.strip()
    if alone := _LETTER_ALONE.fullmatch(text):
        return alone[1].upper()
    if first := _LETTER_FIRST.match(text):
        return first[1] or first[2]
    # Several letters, as in "not A but B", are no choice: a guess would reward hedging.
    named = {match[match.lastindex or 0].upper() for match in _LETTER_NAMED.finditer(text)}
    if len(named) == 1:
        return named.pop()
    return None


_OWN = {"exact": exact_match, "contains": contains, "letter": same_letter}
METRICS: Registry[Callable[[str, str], bool]] = Registry("metric", _OWN)
"""Metrics by name; each takes an answer and the reference."""
