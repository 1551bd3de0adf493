"""ShareGPT's JSON: as LLaVA's, but <image> in a text without media is literal, as in HTML."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_tools.formats.base import Candidate, Setting
from data_tools.formats.objects import read_objects


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """Yield the objects of a file."""
    return read_objects(source, partial(setting.sample_of, literal_tags=True))
