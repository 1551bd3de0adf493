"""Private-use characters that represent media and guard special tokens while a template renders.

A template gets a conversation in which each image and video is a character that occurs nowhere
else. Another is inserted into names of special tokens in the texts, so that the names which are
intact in the rendering are the template's own.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from megatron_vita.errors import DataError

_PRIVATE = range(0xF0000, 0xFFFFE)  # Supplementary Private Use Area-A
_PRIVATE_LETTER = re.compile(f"[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")


class Marks(NamedTuple):
    """Marks of one character each; `opening` and `closing` enclose `{% generation %}` blocks."""

    split: str
    image: str
    video: str
    opening: str
    closing: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> "Marks":
        """Choose marks that occur in none of `texts`.

        Raises:
            DataError: the texts use all private-use characters.
        """
        # Even private-use characters may occur in a text, where they are content.
        used = {letter for text in texts for letter in _PRIVATE_LETTER.findall(text)}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        marks = [letter for letter, _ in zip(free, cls._fields, strict=False)]
        if len(marks) < len(cls._fields):
            raise DataError("the conversation holds all of Unicode's private use characters")
        return cls(*marks)

    def of_medium(self, kind: str) -> str:
        """Mark of an "image" or a "video"."""
        if kind == "image":
            return self.image
        return self.video

    def guarded(self, text: str, names: re.Pattern[str]) -> str:
        """Split every name of a special token in a text by the `split` mark."""
        return names.sub(lambda name: name.group()[0] + self.split + name.group()[1:], text)

    def plain(self, text: str) -> str:
        """Remove the `split` marks from a text."""
        return text.replace(self.split, "")

    def without_generation(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Remove the marks of generation blocks from a rendering; returns the text and the blocks'
        spans."""
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
    """Compile a pattern for any of `names`, the longest at a position first, as tokenizers do."""
    # Alternatives of a regular expression are tried in order, whatever their length.
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
