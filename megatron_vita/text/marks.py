"""Characters that stand for something in the rendering of one conversation.

A template gets a conversation in which a character that occurs nowhere else stands for each image
and video. Another is put inside the names of special tokens that the texts hold, so that the names
which are whole in the rendering are the template's own.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from megatron_vita.errors import DataError

_PRIVATE = range(0xF0000, 0xFFFFE)  # Supplementary Private Use Area-A
_PRIVATE_LETTER = re.compile(f"[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")


class Marks(NamedTuple):
    """One character each; `opening` and `closing` enclose what `{% generation %}` encloses."""

    split: str
    image: str
    video: str
    opening: str
    closing: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> "Marks":
        """Marks that occur in none of `texts`. DataError if these use up Unicode's private
        characters."""
        used = {letter for text in texts for letter in _PRIVATE_LETTER.findall(text)}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        marks = [letter for letter, _ in zip(free, cls._fields, strict=False)]
        if len(marks) < len(cls._fields):
            raise DataError("the conversation holds all of Unicode's private use characters")
        return cls(*marks)

    def of_medium(self, kind: str) -> str:
        """The mark of an "image" or a "video"."""
        if kind == "image":
            return self.image
        return self.video

    def guarded(self, text: str, names: re.Pattern[str]) -> str:
        """The text with every name of a special token in it split."""
        return names.sub(lambda name: name.group()[0] + self.split + name.group()[1:], text)

    def plain(self, text: str) -> str:
        """The text with its names whole again."""
        return text.replace(self.split, "")

    def without_generation(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """A rendering without the marks of generation blocks, and where these were in it."""
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        length = opened = 0
        for piece in re.split(f"([{self.opening}{self.closing}])", rendered):
            if piece == self.opening:
                opened = length
            elif piece == self.closing:
                spans.append((opened, length))
            else:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans


def names_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of `names`, the longest where several begin at one place, as tokenizers do."""
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
