"""Real text that pages show: docstrings of Python's standard library to train on, its language
reference to test with."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from megatron_vita.evaluation.pages import Book, PageStyle, read_text

Part = Literal["train", "held-out"]
"""Samples to train on, or those of the tests; no text, picture or seed is in both."""
TILE = 128
PAGE = PageStyle(size=TILE, font_size=12)
"""A page of one tile: 6 lines of 14 characters."""
SHEET = PageStyle(size=2 * TILE, font_size=12)
"""A page of 2 x 2 tiles: 15 lines of 32 characters."""
LEAST_CHARACTERS = 80  # of a docstring: shorter ones are titles
WORD = re.compile(r"\b[A-Za-z]{2,12}\b")


@lru_cache(maxsize=2)
def text_of(part: Part) -> str:
    """Text of a part: paragraphs in ASCII, in an order that depends on nothing but the version of
    Python."""
    if part == "held-out":
        return read_text(())
    return "\n\n".join(dict.fromkeys(_docstrings(Path(sysconfig.get_path("stdlib")))))


def _docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings of the modules right in a folder, sorted by name."""
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            if len(text) >= LEAST_CHARACTERS and text.isascii():
                yield text


@lru_cache(maxsize=4)
def book_of(part: Part, style: PageStyle = PAGE) -> Book:
    """Endless book of a part's text."""
    return Book(text_of(part), style=style)


@lru_cache(maxsize=4)
def full_lines(part: Part, style: PageStyle) -> tuple[str, ...]:
    """Lines of a part's text as a page of `style` shows them, without empty ones."""
    return tuple(line for line in style.wrap(text_of(part)) if line)


@lru_cache(maxsize=2)
def words_of(part: Part) -> tuple[str, ...]:
    """Distinct words of a part's text, sorted: those of the tests are all words that occur there."""
    return tuple(sorted({word.lower() for word in WORD.findall(text_of(part))}))
