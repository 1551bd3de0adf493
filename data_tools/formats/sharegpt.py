"""ShareGPT's JSON: as LLaVA's, but a text without media may well speak of <image>, as HTML does."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools.formats.base import Candidate, Setting
from data_tools.formats.objects import read_objects


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The objects of a file."""
    return read_objects(source, partial(setting.sample_of, literal_tags=True))
