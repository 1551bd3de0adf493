"""Samples that the example makes, written as chat JSONL with their media."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from megatron_vita.files import atomic_write

Turn = tuple[str, str]
"""A question and its answer."""
Kind = Literal["image", "video"]
FOLDER_FILES = 1000  # media files of a folder: file systems get slow with more
CHUNK = 16  # samples that a process makes at a time, at most
FEW = 6  # samples that no process is started for


@dataclass(frozen=True, kw_only=True)
class Made:
    """A sample before it is written: turns about media, whose contents are in display order.

    `fields`: further fields of its JSON object; `text`: raw text, in the place of turns.
    """

    turns: Sequence[Turn] = ()
    media: Sequence[bytes] = ()
    kind: Kind = "image"
    suffix: str = "png"
    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


Maker = Callable[[int], Made]
"""Make sample number i of a set; the same number gives the same sample in any process."""


def conversation(turns: Sequence[Turn], *, media: int, kind: Kind) -> list[dict[str, str]]:
    """Build the messages of a sample, with its media before the first question."""
    messages = []
    for index, (question, answer) in enumerate(turns):
        tags = ""
        if index == 0 and media:
            tags = f"<{kind}>" * media + "\n"
        messages.append({"role": "user", "content": tags + question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def record(made: Made, paths: Sequence[str]) -> dict[str, Any]:
    """Build the line of a sample, whose media are at `paths`."""
    if made.text:
        return {"text": made.text}
    messages = conversation(made.turns, media=len(paths), kind=made.kind)
    media = {}
    if paths:
        media = {f"{made.kind}s": list(paths)}
    return {"messages": messages, **media, **made.fields}


def write_set(name: str, *, count: int, maker: Maker, folder: Path, workers: int = 0) -> Path:
    """Write `folder`/`name`.jsonl and its media below `folder`/media; a set that exists is kept.

    Args:
        count: number of samples.
        workers: processes; 0: as many as there are cores. The result does not depend on it.
    """
    path = folder / f"{name}.jsonl"
    if path.exists():
        return path
    write = partial(_write_sample, maker, name, folder / "media")
    lines = make_all(write, range(count), workers=workers)
    folder.mkdir(parents=True, exist_ok=True)
    # Last, under its name: a set that was interrupted is made again.
    with atomic_write(path) as partial_file:
        partial_file.write_text("".join(lines))
    return path


def make_all[Result](
    make: Callable[[int], Result], indexes: Sequence[int], *, workers: int = 0
) -> list[Result]:
    """Call `make` with each index, in processes if there are many; results are in order.

    workers: processes; 0: as many as there are cores.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1 or len(indexes) < FEW:
        return [make(index) for index in indexes]
    # Here, so that forked processes find texts and books read.
    first = make(indexes[0])
    # Small enough that a set's few longest films are divided among all processes.
    chunk = max(1, min(CHUNK, len(indexes) // (4 * workers)))
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        return [first, *pool.map(make, indexes[1:], chunksize=chunk)]


def write_media(made: Made, name: str, index: int, *, media: Path) -> list[str]:
    """Write the media of sample `index` of a set below `media`; returns their relative paths."""
    paths = []
    for number, content in enumerate(made.media):
        relative = f"{name}/{index // FOLDER_FILES}/{index}-{number}.{made.suffix}"
        target = media / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        paths.append(relative)
    return paths


def _write_sample(maker: Maker, name: str, media: Path, index: int) -> str:
    """Write the media of one sample; returns its line."""
    made = maker(index)
    return json.dumps(record(made, write_media(made, name, index, media=media))) + "\n"
