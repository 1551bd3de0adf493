"""Import of other formats to chat JSONL, source by source, in worker processes; resumable.

Beside `NAME.jsonl` are `NAME.rejected.jsonl`, a line for each rejected sample,
`NAME.progress.jsonl`, and during the work the folder `NAME.parts` with a part for each source.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.formats import FORMATS
from data_tools.formats.base import Candidate, Setting, walk
from data_tools.reading.samples import check_medium
from data_tools.workers.pool import SampleGuard, WorkerOptions, as_data_error
from data_tools.workers.progress import ProgressFile
from megatron_vita.data.samples.media_fields import FIELDS
from megatron_vita.data.samples.records import check_record
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import atomic_write
from megatron_vita.media.kinds import kind_of_name

BATCH = 32  # candidates of a step: one for each would cost two messages a sample
KINDS = ("samples", "rejected")


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """An import of sources to one JSONL file."""

    format: str
    paths: list[Path]
    out: Path
    setting: Setting

    def part(self, number: int, kind: str) -> Path:
        """Path of the samples, or of the rejections, of a source until all sources are done."""
        return self.out.with_suffix(".parts") / f"{number:06d}.{kind}.jsonl"


class ImportTask(NamedTuple):
    """One source to read."""

    job: ImportJob
    number: int
    source: Path


def import_samples(job: ImportJob, *, options: WorkerOptions) -> dict[str, int]:
    """Write the JSONL file; returns the numbers of samples and of rejected ones.

    Raises:
        ConfigError: sources or folders are missing, or the output exists and is of other or unknown
            sources.
    """
    _check_job(job)
    sources = FORMATS[job.format].list_sources(job.paths)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    path = job.out.with_suffix(".progress.jsonl")
    progress = ProgressFile(path, stamp=_stamp(job, sources))
    # The file of this import exists only once all sources are finished: any other is not its own.
    if job.out.exists() and len(progress.finished) < len(sources):
        raise ConfigError(
            f"{job.out}: it exists, but {path} does not describe it; delete it or choose another "
            "--out"
        )
    job.part(0, "samples").parent.mkdir(exist_ok=True)
    if not job.out.exists():
        # Parts may have been deleted since: their sources are read again.
        for number in list(progress.finished):
            if not all(job.part(number, kind).exists() for kind in KINDS):
                del progress.finished[number]
    tasks = {number: ImportTask(job, number, source) for number, source in enumerate(sources)}
    left = sum(
        _size(task.source) for number, task in tasks.items() if number not in progress.finished
    )
    # Folders have no size that tells how much of them is read: their samples are counted.
    unit = "samples"
    if left:
        unit = "B"
    progress.run(_import_source, tasks, options=options, total=left, unit=unit)
    _join_parts(job, len(sources))
    return {kind: sum(progress.finished[number][kind] for number in tasks) for kind in KINDS}


def rejected_path(out: Path) -> Path:
    """Path of the list of rejected samples."""
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
    # As text, so that the stamp equals the one that was read back from JSON.
    setting = {name: str(value) for name, value in vars(job.setting).items()}
    return {
        "format": job.format,
        **setting,
        "sources": [[str(path), *_version(path)] for path in sources],
    }


def _version(source: Path) -> tuple[int, int | str]:
    """Size and modification time of a file; for a folder those of all media and texts in it."""
    if source.is_file():
        return source.stat().st_size, source.stat().st_mtime_ns
    digest = hashlib.sha256()
    # Only files that can be part of a sample: others may change.
    for path in walk(source):
        if kind_of_name(path.name) or path.name.lower().endswith(".txt"):
            # Of the link itself where its target is missing, which is a state as well.
            known = path.lstat()
            if path.exists():
                known = path.stat()
            digest.update(
                f"{path.relative_to(source)!r} {known.st_size} {known.st_mtime_ns}\n".encode()
            )
    return 0, digest.hexdigest()


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return 0


def _import_source(task: ImportTask, guard: SampleGuard) -> dict[str, int]:
    """Write the two parts of a source; returns their lengths.

    A failure that ends the reading is the last rejection.
    """
    counts = dict.fromkeys(KINDS, 0)
    with ExitStack() as stack:
        files = {}
        for kind in KINDS:
            partial_path = stack.enter_context(atomic_write(task.job.part(task.number, kind)))
            files[kind] = stack.enter_context(open(partial_path, "w", encoding="utf-8"))
        for kind, entry in _sorted_samples(task, guard):
            # Reasons may quote lone surrogates, which only escapes can write; samples have none.
            files[kind].write(json.dumps(entry, ensure_ascii=kind == "rejected") + "\n")
            counts[kind] += 1
    return counts


def _sorted_samples(task: ImportTask, guard: SampleGuard) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("samples", sample) or ("rejected", place and reason) for each candidate."""
    candidates = FORMATS[task.job.format].read(task.source, task.job.setting)
    position = 0
    in_bytes = _size(task.source) > 0
    while True:
        try:
            batch, end = guard.run(lambda known: _read_batch(candidates))
        except DataError as error:
            # The reading itself hung or crashed, and only it could find the next batch.
            batch = []
            end = str(error)
        yield from map(partial(_checked_candidate, task), batch)
        if end:
            yield "rejected", {"source": str(task.source), "place": "the rest", "reason": end}
        if end or not batch:
            return
        # As the bar counts: see `unit` in `import_samples`.
        if in_bytes:
            guard.advance(batch[-1].position - position)
        else:
            guard.advance(len(batch))
        position = batch[-1].position


def _read_batch(candidates: Iterator[Candidate]) -> tuple[list[Candidate], str]:
    """Read the next candidates; returns them with the reason if reading failed, else ""."""
    batch: list[Candidate] = []
    try:
        for candidate in itertools.islice(candidates, BATCH):
            batch.append(candidate)
    except DataError as error:
        return batch, str(error)
    return batch, ""


def _checked_candidate(task: ImportTask, candidate: Candidate) -> tuple[str, dict[str, Any]]:
    setting = task.job.setting
    if FORMATS[task.job.format].writes_media and setting.media_out:
        root = setting.media_out
    else:
        root = setting.media
    try:
        return "samples", as_data_error(partial(_checked, candidate, root))
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
    # Lone surrogates pass through json, and would end the writing of the file.
    try:
        json.dumps(sample, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the sample is not valid Unicode: {error}") from error
    return sample


def _join_parts(job: ImportJob, sources: int) -> None:
    """Concatenate the parts of all sources to the two resulting files."""
    if not job.out.exists():
        # The samples last: their file shows that the import is complete.
        for kind, target in (("rejected", rejected_path(job.out)), ("samples", job.out)):
            with atomic_write(target) as partial_path, open(partial_path, "wb") as whole:
                for number in range(sources):
                    with open(job.part(number, kind), "rb") as part:
                        shutil.copyfileobj(part, whole)
    shutil.rmtree(job.part(0, "samples").parent)
