"""LLaVA's JSON: objects with `image` or `video` (one or several paths) and `conversations`.

Other records that `megatron_vita/data/samples/foreign.py` reads are accepted, too.
"""

from collections.abc import Iterator
from pathlib import Path

from data_tools.formats.base import Candidate, Setting, find_files
from data_tools.formats.objects import read_objects


def list_sources(paths: list[Path]) -> list[Path]:
    """List JSON files (one array) and JSONL files."""
    return find_files(paths, ".json", ".jsonl")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """Yield the objects of a file."""
    return read_objects(source, setting.sample_of)
