"""Sharding of JSONL files in worker processes; an interrupted run can be continued.

A folder holds one dataset: `NAME-000000.tar`, ..., `progress.jsonl` (the inputs of the shards, then
a line for each finished one), `rejected.jsonl` (a line for each rejected sample) and `files.jsonl`
(paths of the JSONL files). Shard i is made of the i-th run of `samples_per_shard` lines, good or
bad, so that shards depend neither on each other nor on the process that writes them. A shard longer
than `max_bytes` continues in `NAME-000000_1.tar`.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from data_tools.reading.lines import Line, LineRange, divide_lines, read_ranges
from data_tools.reading.samples import Sample, check_line, key_stem
from data_tools.reencode import KEEP, Reencode
from data_tools.workers.pool import IN_PROCESS, SampleGuard, WorkerOptions
from data_tools.workers.progress import ProgressFile
from megatron_vita.config import DatasetConfig, load_recipe
from megatron_vita.data.shards.tar import SampleWriter
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import publish, write_json_lines

PROGRESS = "progress.jsonl"
REJECTED = "rejected.jsonl"
FILES = "files.jsonl"
MEGABYTE = 10**6
MADE = r"-(\d{6}|[1-9]\d{6,})(_[1-9]\d*)?"  # end of a shard's name, after that of the dataset
# Endings of tars, of their temporary files, and of the files beside them.
BESIDE = r"\.(tar(\.whole)?(\.partial)?|(([0-9a-f]+\.)?index\.parquet|quarantine\.json)(\.[0-9a-f]+\.partial)?)"
Rejection = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Sharding of JSONL files to one dataset folder."""

    files: list[Path]
    media_root: Path
    out: Path
    samples_per_shard: int
    strict: bool
    reencode: Reencode = field(default=KEEP)
    max_bytes: int = 0  # size of a tar; 0: no limit

    def shard_path(self, shard: int, tar: int = 0) -> Path:
        """Path of tar `tar` of shard number `shard`, named like the folder."""
        name = f"{self.out.resolve().name}-{shard:06d}"
        if tar:
            name += f"_{tar}"
        return self.out / f"{name}.tar"


@dataclass
class ShardCount:
    """Counts of the lines of one shard, or of all: good samples, rejections, tars."""

    samples: int
    rejected: list[Rejection]
    tars: int = 0


class ShardTask(NamedTuple):
    """One shard to write."""

    job: ShardJob
    shard: int
    ranges: list[LineRange]


def find_jobs(
    files: list[Path], *, out: Path | None, media: Path | None, **fields: Any
) -> list[ShardJob]:
    """Jobs of a command line: JSONL files to be sharded to `out`, or a recipe with JSONL datasets.

    `fields` are the other fields of ShardJob.

    Raises:
        ConfigError: it names neither, or both, or different files for one folder.
    """
    if [file.suffix for file in files] not in ([".yaml"], [".yml"]):
        if out is None:
            raise ConfigError("--out is needed: the folder of the dataset")
        return [ShardJob(files=files, media_root=media or Path(), out=out, **fields)]
    if out is not None or media is not None:
        raise ConfigError(
            "--out and --media are for JSONL files: a recipe's datasets name their folders"
        )
    return _recipe_jobs(files[0], fields)


def _recipe_jobs(recipe: Path, fields: dict[str, Any]) -> list[ShardJob]:
    data = load_recipe(recipe, []).data
    jobs = dict[Path, ShardJob]()
    for dataset in (*data.train, *data.validation):
        if dataset.jsonl:
            job = _job_of(dataset, fields)
            # Datasets may share a folder, such as one for training and for validation.
            if (first := jobs.setdefault(job.out, job)) != job:
                raise ConfigError(
                    f"{recipe}: dataset {dataset.name}: its shards in {job.out} are made of "
                    f"{first.files[0]} with media in {first.media_root} for another dataset; name "
                    "another folder in its shards"
                )
    if not jobs:
        raise ConfigError(f"{recipe}: none of its datasets has a jsonl")
    return list(jobs.values())


def _job_of(dataset: DatasetConfig, fields: dict[str, Any]) -> ShardJob:
    return ShardJob(
        files=[Path(dataset.jsonl)],
        media_root=Path(dataset.media or Path(dataset.jsonl).parent),
        out=Path(dataset.shards).parent,
        **fields,
    )


def make_shards(job: ShardJob, *, options: WorkerOptions = IN_PROCESS) -> ShardCount:
    """Write the shards that do not exist, and `rejected.jsonl`; returns the counts of all runs.

    A bad sample is left out, and listed with its file, line and reason. Shards of an earlier job in
    the folder are removed at the end.

    Raises:
        ConfigError: the folder holds shards of other inputs.
        DataError: with `strict`: naming file and line of the first bad sample; its shard is not
            written.
    """
    _check_job(job)
    job.out.mkdir(parents=True, exist_ok=True)
    progress = ProgressFile(job.out / PROGRESS, stamp=_stamp(job))
    ranges = divide_lines(job.files, size=job.samples_per_shard)
    tasks = {shard: ShardTask(job, shard, mine) for shard, mine in enumerate(ranges)}
    counts = {shard: ShardCount(**result) for shard, result in progress.finished.items()}
    # Tars may have been deleted since: their shards are written again.
    for shard, count in list(counts.items()):
        if not all(job.shard_path(shard, tar).exists() for tar in range(count.tars)):
            del counts[shard], progress.finished[shard]
    if job.strict:
        # Rejections of an earlier run without --strict count, too.
        _refuse_first([counts[shard] for shard in sorted(counts)])
    left = sum(
        line_range.lines
        for shard, task in tasks.items()
        if shard not in counts
        for line_range in task.ranges
    )
    progress.run(_write_shard, tasks, options=options, total=left, unit="samples")
    # From the progress file, which also has the shards of earlier runs.
    results = [ShardCount(**progress.finished[shard]) for shard in tasks]
    rejected = [entry for count in results for entry in count.rejected]
    write_json_lines(job.out / REJECTED, rejected)
    write_json_lines(job.out / FILES, [{"file": str(path.resolve())} for path in job.files])
    # At the end, when what replaces them is complete.
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
    # Equal stems would give equal keys to samples of different files.
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
    """Remove tars with this tool's names that do not belong to the job, and their side files."""
    mine = {
        job.shard_path(shard, tar).stem
        for shard, count in enumerate(results)
        for tar in range(count.tars)
    }
    name = re.compile(f"(?P<stem>{re.escape(job.out.resolve().name)}{MADE}){BESIDE}")
    for path in list(job.out.iterdir()):
        if (match := name.fullmatch(path.name)) and match["stem"] not in mine:
            path.unlink()


def _write_shard(task: ShardTask, guard: SampleGuard) -> dict[str, Any]:
    """Write a shard; returns the fields of its ShardCount."""
    job = task.job
    count = ShardCount(0, [])
    with _Tars(job, task.shard) as tars:
        for line in read_ranges(task.ranges):
            guard.advance()
            try:
                sample = guard.run(partial(_make_sample, line, job))
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
    """Writer of the tars of a shard, split at `max_bytes`; they get their names when all are
    complete."""

    def __init__(self, job: ShardJob, shard: int) -> None:
        self._job = job
        self._shard = shard
        self.count = 0

    def __enter__(self) -> Self:
        self._begin()
        return self

    def write(self, sample: Sample) -> None:
        # An estimate: headers and padding of the tar are not counted.
        media = sum(len(file.data) for files in sample.media.values() for file in files)
        size = media + len(str(sample.record))
        # A sample larger than the limit gets a tar of its own rather than none.
        if self._job.max_bytes and self._size and self._size + size > self._job.max_bytes:
            self._writer.__exit__()
            self._begin()
        self._size += size
        self._writer.write(sample.key, record=sample.record, media=sample.media)

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(error_type, error, trace)
        for path in map(self._path, range(self.count)):
            # All tars of a shard get their names together: a glob must not find half a shard.
            if error_type is None:
                publish(_whole(path), path)
            else:
                _whole(path).unlink(missing_ok=True)

    def _begin(self) -> None:
        self._writer = SampleWriter(_whole(self._path(self.count))).__enter__()
        self._size = 0
        self.count += 1

    def _path(self, tar: int) -> Path:
        return self._job.shard_path(self._shard, tar)


def _whole(path: Path) -> Path:
    """Temporary path of a complete tar until the others of its shard are complete, too."""
    return path.with_name(path.name + ".whole")


def _make_sample(line: Line, job: ShardJob, known: bool) -> Sample:
    """Build the sample of a line; media are decoded unless `known` to be good, and re-encoded."""
    # An earlier attempt decoded it, before another sample ended the process.
    sample = check_line(line, media_root=job.media_root, decode=not known)
    prefix = f"{line.file}:{line.number}: "
    media = {
        kind: [job.reencode(kind, file, prefix=prefix) for file in files]
        for kind, files in sample.media.items()
    }
    return replace(sample, media=media)


def _stamp(job: ShardJob) -> dict[str, Any]:
    return {
        # All that decides what a shard holds; files by content, since copies make the same shards.
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
