"""From other formats to our chat JSONL, source by source, in worker processes; an interrupted run
goes on.

Beside `NAME.jsonl` lie `NAME.rejected.jsonl`, a line for each sample left out,
`NAME.progress.jsonl`, and while the work lasts the folder `NAME.parts` with a part for each source.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.formats import FORMATS
from data_tools.formats.base import Candidate, Setting, walk
from data_tools.pool import Crew, Steps, judged
from data_tools.progress import Progress
from data_tools.samples import check_medium
from megatron_vita.data.samples.media_fields import FIELDS
from megatron_vita.data.samples.records import check_record
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.kinds import kind_of_name

BATCH = 32
KINDS = ("samples", "rejected")


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """What is to become chat JSONL."""

    format: str
    paths: list[Path]
    out: Path
    setting: Setting

    def part(self, number: int, kind: str) -> Path:
        """Where the samples, or what is rejected, of a source are kept until all are done."""
        return self.out.with_suffix(".parts") / f"{number:06d}.{kind}.jsonl"


class ImportTask(NamedTuple):
    """One source to be read."""

    job: ImportJob
    number: int
    source: Path


def import_samples(job: ImportJob, *, crew: Crew) -> dict[str, int]:
    """Writes the JSONL file; gives how many samples there are and how many were rejected.

    ConfigError if sources or folders are missing, or the output is of other sources or nothing
    tells of which.
    """
    _check_job(job)
    sources = FORMATS[job.format].list_sources(job.paths)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    path = job.out.with_suffix(".progress.jsonl")
    progress = Progress(path, stamp=_stamp(job, sources))
    if job.out.exists() and len(progress.finished) < len(sources):
        raise ConfigError(
            f"{job.out}: it is there, but {path} does not tell of it; delete it or choose another --out"
        )
    job.part(0, "samples").parent.mkdir(exist_ok=True)
    if not job.out.exists():
        for number in [
            n for n in progress.finished if not all(job.part(n, kind).exists() for kind in KINDS)
        ]:
            del progress.finished[number]
    tasks = {number: ImportTask(job, number, source) for number, source in enumerate(sources)}
    left = sum(
        _size(task.source) for number, task in tasks.items() if number not in progress.finished
    )
    progress.run(_import_source, tasks, crew=crew, total=left, unit="B" if left else "samples")
    _join_parts(job, len(sources))
    return {kind: sum(progress.finished[number][kind] for number in tasks) for kind in KINDS}


def rejected_path(out: Path) -> Path:
    """Where the list of rejected samples lies."""
    return out.with_suffix(".rejected.jsonl")


def _check_job(job: ImportJob) -> None:
    if job.format not in FORMATS:
        raise ConfigError(f"format {job.format!r}; known: {', '.join(FORMATS)}")
    if job.out.suffix != ".jsonl":
        raise ConfigError(f"--out {job.out}: the name must end in .jsonl")
    if missing := [path for path in job.paths if not path.exists()]:
        raise ConfigError(f"{missing[0]}: there is no such file or folder")
    if not job.setting.media.is_dir():
        raise ConfigError(f"--media {job.setting.media} is not a folder")
    if FORMATS[job.format].writes_media and job.setting.media_out is None:
        raise ConfigError(
            f"{job.format} holds media inside its files: name a folder for them with --media-out"
        )


def _stamp(job: ImportJob, sources: list[Path]) -> dict[str, Any]:
    setting = {name: str(value) for name, value in vars(job.setting).items()}
    return {
        "format": job.format,
        **setting,
        "sources": [[str(path), *_version(path)] for path in sources],
    }


def _version(source: Path) -> tuple[int, int | str]:
    """A file's size and time of change; a folder's are those of all media and texts in it."""
    if source.is_file():
        return source.stat().st_size, source.stat().st_mtime_ns
    digest = hashlib.sha256()
    for path in walk(source):
        if kind_of_name(path.name) or path.name.lower().endswith(".txt"):
            known = path.stat() if path.exists() else path.lstat()
            digest.update(
                f"{path.relative_to(source)!r} {known.st_size} {known.st_mtime_ns}\n".encode()
            )
    return 0, digest.hexdigest()


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return 0


def _import_source(task: ImportTask, steps: Steps) -> dict[str, int]:
    """Writes the two parts of a source; gives their lengths. What ends its reading is the last
    rejection."""
    counts = dict.fromkeys(KINDS, 0)
    paths = {kind: task.job.part(task.number, kind) for kind in KINDS}
    partials = {kind: path.with_name(path.name + ".partial") for kind, path in paths.items()}
    with ExitStack() as stack:
        files = {
            kind: stack.enter_context(open(path, "w", encoding="utf-8"))
            for kind, path in partials.items()
        }
        for kind, entry in _sorted_samples(task, steps):
            files[kind].write(json.dumps(entry, ensure_ascii=kind == "rejected") + "\n")
            counts[kind] += 1
    for kind in KINDS:
        os.replace(partials[kind], paths[kind])
    return counts


def _sorted_samples(task: ImportTask, steps: Steps) -> Iterator[tuple[str, dict[str, Any]]]:
    """("samples", sample) or ("rejected", where and why) of each candidate of a source; a step
    reads some of them."""
    candidates = FORMATS[task.job.format].read(task.source, task.job.setting)
    position = 0
    in_bytes = _size(task.source) > 0
    while True:
        try:
            batch, end = steps.run(lambda known: _read_batch(candidates))
        except DataError as error:
            batch = []
            end = str(error)
        yield from map(partial(_judged, task), batch)
        if end:
            yield "rejected", {"source": str(task.source), "place": "the rest", "reason": end}
        if end or not batch:
            return
        steps.advance(batch[-1].position - position if in_bytes else len(batch))
        position = batch[-1].position


def _read_batch(candidates: Iterator[Candidate]) -> tuple[list[Candidate], str]:
    """The next candidates, and why there are no more where reading failed."""
    batch: list[Candidate] = []
    try:
        for candidate in itertools.islice(candidates, BATCH):
            batch.append(candidate)
    except DataError as error:
        return batch, str(error)
    return batch, ""


def _judged(task: ImportTask, candidate: Candidate) -> tuple[str, dict[str, Any]]:
    setting = task.job.setting
    if FORMATS[task.job.format].writes_media and setting.media_out:
        root = setting.media_out
    else:
        root = setting.media
    try:
        return "samples", judged(partial(_checked, candidate, root))
    except DataError as error:
        return "rejected", {
            "source": str(task.source),
            "place": candidate.place,
            "reason": str(error),
        }


def _checked(candidate: Candidate, root: Path) -> dict[str, Any]:
    sample = candidate.make()
    check_record(sample)
    for field in FIELDS:
        for i, name in enumerate(sample.get(field, [])):
            check_medium(name, f"{field}[{i}]", root=root)
    try:
        json.dumps(sample, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the sample is not valid Unicode: {error}") from error
    return sample


def _join_parts(job: ImportJob, sources: int) -> None:
    """The parts of all sources, one behind the other, as the two files that are the result."""
    if not job.out.exists():
        for kind, target in (("rejected", rejected_path(job.out)), ("samples", job.out)):
            partial_path = target.with_name(target.name + ".partial")
            with open(partial_path, "wb") as whole:
                for number in range(sources):
                    with open(job.part(number, kind), "rb") as part:
                        shutil.copyfileobj(part, whole)
            os.replace(partial_path, target)
    shutil.rmtree(job.part(0, "samples").parent)
