"""From JSONL files to shards, in worker processes; an interrupted run goes on where it stopped.

A folder holds one dataset: `NAME-000000.tar`, ..., `progress.jsonl` (what the shards are made of,
then a line for each finished one) and `rejected.jsonl` (a line for each sample left out). Shard i
is made of the i-th run of `samples_per_shard` lines, whether or not they are good, so no shard
depends on another, nor on who writes it. Where it would be longer than `max_bytes`, it goes on in
`NAME-000000_1.tar`.
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from data_tools.lines import Line, Stretch, divide_lines, read_stretches
from data_tools.pool import Crew, Steps
from data_tools.progress import Progress, write_lines
from data_tools.reencode import KEEP, Reencode
from data_tools.samples import Sample, check_line, key_stem
from megatron_vita.config import DatasetConfig, load_recipe
from megatron_vita.data.shards.tar import SampleWriter
from megatron_vita.errors import ConfigError, DataError

PROGRESS = "progress.jsonl"
REJECTED = "rejected.jsonl"
HERE = Crew(workers=0)
MEGABYTE = 10**6
MADE = r"-(\d{6}|[1-9]\d{6,})(_[1-9]\d*)?"  # follows a dataset's name in those of its shards
BESIDE = r"\.(tar(\.whole)?(\.partial)?|index\.parquet|quarantine\.json)"
Rejection = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What is to become shards, and where."""

    files: list[Path]
    media_root: Path
    out: Path
    samples_per_shard: int
    strict: bool
    reencode: Reencode = field(default=KEEP)
    max_bytes: int = 0  # of a tar; 0: any

    def shard_path(self, shard: int, tar: int = 0) -> Path:
        """Where tar `tar` of shard number `shard` goes; the folder's name is the dataset's."""
        return self.out / f"{self.out.resolve().name}-{shard:06d}{f'_{tar}' if tar else ''}.tar"


@dataclass
class ShardCount:
    """What became of the lines of one shard, or of all."""

    samples: int
    rejected: list[Rejection]
    tars: int = 0


class ShardTask(NamedTuple):
    """One shard to be written."""

    job: ShardJob
    shard: int
    stretches: list[Stretch]


def find_jobs(
    files: list[Path], *, out: Path | None, media: Path | None, **options: Any
) -> list[ShardJob]:
    """The work that a command line names: JSONL files that become shards in `out`, or a recipe
    whose datasets have JSONL files. `options` are ShardJob's other fields. ConfigError if it names
    neither, or both, or other files for one folder.
    """
    if [file.suffix for file in files] not in ([".yaml"], [".yml"]):
        if out is None:
            raise ConfigError("--out is needed: the folder of the dataset")
        return [ShardJob(files=files, media_root=media or Path(), out=out, **options)]
    if out is not None or media is not None:
        raise ConfigError(
            "--out and --media are for JSONL files: a recipe's datasets name their folders"
        )
    return _recipe_jobs(files[0], options)


def _recipe_jobs(recipe: Path, options: dict[str, Any]) -> list[ShardJob]:
    data = load_recipe(recipe, []).data
    jobs = dict[Path, ShardJob]()
    for dataset in (*data.train, *data.validation):
        if dataset.jsonl:
            job = _job_of(dataset, options)
            if (first := jobs.setdefault(job.out, job)) != job:
                raise ConfigError(
                    f"{recipe}: dataset {dataset.name}: its shards in {job.out} are made of {first.files[0]} with "
                    f"media in {first.media_root} for another dataset; name another folder in its shards"
                )
    if not jobs:
        raise ConfigError(f"{recipe}: none of its datasets has a jsonl")
    return list(jobs.values())


def _job_of(dataset: DatasetConfig, options: dict[str, Any]) -> ShardJob:
    return ShardJob(
        files=[Path(dataset.jsonl)],
        media_root=Path(dataset.media or Path(dataset.jsonl).parent),
        out=Path(dataset.shards).parent,
        **options,
    )


def make_shards(job: ShardJob, *, crew: Crew = HERE) -> ShardCount:
    """Writes the shards that are not there yet, and `rejected.jsonl`. Gives the counts of all, also
    of earlier runs.

    Shards of the dataset's name that earlier work left, and this work does not have, are removed
    when it is done.

    A bad sample is left out, its file, line and reason listed. With `strict` the first one is a
    DataError that names file and line, and its shard is not written. ConfigError if the folder
    holds shards of other inputs.
    """
    _check_job(job)
    job.out.mkdir(parents=True, exist_ok=True)
    progress = Progress(job.out / PROGRESS, stamp=_stamp(job))
    stretches = divide_lines(job.files, size=job.samples_per_shard)
    tasks = {shard: ShardTask(job, shard, mine) for shard, mine in enumerate(stretches)}
    counts = {shard: ShardCount(**result) for shard, result in progress.finished.items()}
    for shard, count in list(counts.items()):
        if not all(job.shard_path(shard, tar).exists() for tar in range(count.tars)):
            del counts[shard], progress.finished[shard]
    if job.strict:
        _refuse_first([counts[shard] for shard in sorted(counts)])
    left = sum(
        stretch.lines
        for shard, task in tasks.items()
        if shard not in counts
        for stretch in task.stretches
    )
    progress.run(_write_shard, tasks, crew=crew, total=left, unit="samples")
    results = [ShardCount(**progress.finished[shard]) for shard in tasks]
    rejected = [entry for count in results for entry in count.rejected]
    write_lines(job.out / REJECTED, rejected)
    _remove_strays(job, results)
    return ShardCount(
        sum(count.samples for count in results), rejected, tars=sum(count.tars for count in results)
    )


def _check_job(job: ShardJob) -> None:
    if job.samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard is {job.samples_per_shard}: it must be at least 1")
    if job.max_bytes < 0:
        raise ConfigError(
            f"--max-shard-mb is {job.max_bytes / MEGABYTE:g}: it must not be negative"
        )
    if not job.media_root.is_dir():
        raise ConfigError(f"--media {job.media_root} is not a folder")
    stems = Counter(map(key_stem, job.files))
    if len(stems) < len(job.files):
        stem = stems.most_common(1)[0][0]
        same = ", ".join(str(path) for path in job.files if key_stem(path) == stem)
        raise ConfigError(
            f"{same}: samples get their names from these files' names, which must differ"
        )


def _refuse_first(counts: list[ShardCount]) -> None:
    for count in counts:
        if count.rejected:
            raise DataError("{file}:{line}: {reason}".format(**count.rejected[0]))


def _remove_strays(job: ShardJob, results: list[ShardCount]) -> None:
    """Removes tars that only this tool names so and that are not of this work, and the files beside
    them."""
    mine = {
        job.shard_path(shard, tar).stem
        for shard, count in enumerate(results)
        for tar in range(count.tars)
    }
    name = re.compile(f"(?P<stem>{re.escape(job.out.resolve().name)}{MADE}){BESIDE}")
    for path in list(job.out.iterdir()):
        if (match := name.fullmatch(path.name)) and match["stem"] not in mine:
            path.unlink()


def _write_shard(task: ShardTask, steps: Steps) -> dict[str, Any]:
    """Writes a shard; gives the fields of its ShardCount."""
    job = task.job
    count = ShardCount(0, [])
    with _Tars(job, task.shard) as tars:
        for line in read_stretches(task.stretches):
            steps.advance()
            try:
                sample = steps.run(partial(_make_sample, line, job))
            except DataError as error:
                if job.strict:
                    raise DataError(f"{line.file}:{line.number}: {error}") from error
                count.rejected.append(
                    {"file": str(line.file), "line": line.number, "reason": str(error)}
                )
                continue
            tars.write(sample)
            count.samples += 1
    count.tars = tars.count
    return vars(count)


class _Tars:
    """The tars of a shard: another is begun where a sample would make one longer than it may be.

    They get their names when all are whole.
    """

    def __init__(self, job: ShardJob, shard: int) -> None:
        self._job = job
        self._shard = shard
        self.count = 0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def write(self, sample: Sample) -> None:
        size = sum(len(file.data) for files in sample.media.values() for file in files) + len(
            str(sample.record)
        )
        if self._job.max_bytes and self._size and self._size + size > self._job.max_bytes:
            self._writer.__exit__(None)
            self._begin()
        self._size += size
        self._writer.write(sample.key, record=sample.record, media=sample.media)

    def __exit__(self, error_type: type | None, *rest: object) -> None:
        self._writer.__exit__(error_type, *rest)
        for path in map(self._path, range(self.count)):
            if error_type is None:
                os.replace(_whole(path), path)
            else:
                _whole(path).unlink(missing_ok=True)

    def _begin(self) -> None:
        self._writer = SampleWriter(_whole(self._path(self.count))).__enter__()
        self._size = 0
        self.count += 1

    def _path(self, tar: int) -> Path:
        return self._job.shard_path(self._shard, tar)


def _whole(path: Path) -> Path:
    """Where a tar that is whole waits for the others of its shard."""
    return path.with_name(path.name + ".whole")


def _make_sample(line: Line, job: ShardJob, known: bool) -> Sample:
    """The sample of a line, its media decoded unless it is known to be good, and encoded anew where
    that is wanted."""
    sample = check_line(line, media_root=job.media_root, decode=not known)
    place = f"{line.file}:{line.number}: "
    media = {
        kind: [job.reencode(kind, file, place=place) for file in files]
        for kind, files in sample.media.items()
    }
    return replace(sample, media=media)


def _stamp(job: ShardJob) -> dict[str, Any]:
    return {
        "samples_per_shard": job.samples_per_shard,
        "media": str(job.media_root.resolve()),
        "reencode": vars(job.reencode),
        "max_bytes": job.max_bytes,
        "files": [[key_stem(path), _digest(path)] for path in job.files],
    }


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error
