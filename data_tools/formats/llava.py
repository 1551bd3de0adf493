"""LLaVA's JSON: objects with `image` or `video` (a path or several) and `conversations` of human
and gpt; and whatever else `megatron_vita/data/samples/foreign.py` reads."""

from collections.abc import Iterator
from pathlib import Path

from data_tools.formats.base import Candidate, Setting, find_files
from data_tools.formats.objects import read_objects


def list_sources(paths: list[Path]) -> list[Path]:
    """JSON files (one array) and JSONL files."""
    return find_files(paths, ".json", ".jsonl")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The objects of a file."""
    return read_objects(source, setting.sample_of)
