"""From JSONL files to shards, in worker processes; an interrupted run goes on where it stopped.

A folder holds one dataset: `NAME-000000.tar`, ..., `progress.jsonl` (what the shards are made of, then a line for each
finished one) and `rejected.jsonl` (a line for each sample left out). Shard i is made of the i-th run of
`samples_per_shard` lines, whether or not they are good, so no shard depends on another, nor on who writes it.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.lines import Line, Stretch, divide_lines, read_stretches
from data_tools.pool import Crew, Steps
from data_tools.progress import Progress, write_lines
from data_tools.reencode import KEEP, Reencode
from data_tools.samples import Sample, check_line, key_stem
from megatron_vita.data.shards import SampleWriter
from megatron_vita.errors import ConfigError, DataError

PROGRESS, REJECTED = "progress.jsonl", "rejected.jsonl"
HERE = Crew(workers=0)
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

    def shard_path(self, shard: int) -> Path:
        """Where shard number `shard` goes; the folder's name is the dataset's."""
        return self.out / f"{self.out.resolve().name}-{shard:06d}.tar"


@dataclass
class ShardCount:
    """What became of the lines of one shard, or of all."""

    samples: int
    rejected: list[Rejection]


class ShardTask(NamedTuple):
    """One shard to be written."""

    job: ShardJob
    shard: int
    stretches: list[Stretch]


def make_shards(job: ShardJob, *, crew: Crew = HERE) -> ShardCount:
    """Writes the shards that are not there yet, and `rejected.jsonl`. Gives the counts of all, also of earlier runs.

    A bad sample is left out, its file, line and reason listed. With `strict` the first one is a DataError that names
    file and line, and its shard is not written. ConfigError if the folder holds shards of other inputs.
    """
    _check_job(job)
    job.out.mkdir(parents=True, exist_ok=True)
    progress = Progress(job.out / PROGRESS, stamp=_stamp(job))
    stretches = divide_lines(job.files, size=job.samples_per_shard)
    tasks = {shard: ShardTask(job, shard, mine) for shard, mine in enumerate(stretches)}
    for shard in [shard for shard in progress.finished if not job.shard_path(shard).exists()]:
        del progress.finished[shard]
    counts = {shard: ShardCount(**result) for shard, result in progress.finished.items()}
    if job.strict:
        _refuse_first([counts[shard] for shard in sorted(counts)])
    left = sum(stretch.lines for shard, task in tasks.items() if shard not in counts for stretch in task.stretches)
    progress.run(_write_shard, tasks, crew=crew, total=left, unit="samples")
    results = [ShardCount(**progress.finished[shard]) for shard in tasks]
    rejected = [entry for count in results for entry in count.rejected]
    write_lines(job.out / REJECTED, rejected)
    return ShardCount(sum(count.samples for count in results), rejected)


def _check_job(job: ShardJob) -> None:
    if job.samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard is {job.samples_per_shard}: it must be at least 1")
    if not job.media_root.is_dir():
        raise ConfigError(f"--media {job.media_root} is not a folder")
    stems = Counter(map(key_stem, job.files))
    if len(stems) < len(job.files):
        stem = stems.most_common(1)[0][0]
        same = ", ".join(str(path) for path in job.files if key_stem(path) == stem)
        raise ConfigError(f"{same}: samples get their names from these files' names, which must differ")


def _refuse_first(counts: list[ShardCount]) -> None:
    for count in counts:
        if count.rejected:
            raise DataError("{file}:{line}: {reason}".format(**count.rejected[0]))


def _write_shard(task: ShardTask, steps: Steps) -> dict[str, Any]:
    """Writes a shard; gives the fields of its ShardCount."""
    job, count = task.job, ShardCount(0, [])
    with SampleWriter(job.shard_path(task.shard)) as writer:
        for line in read_stretches(task.stretches):
            steps.advance()
            try:
                sample = steps.run(partial(_make_sample, line, job))
            except DataError as error:
                if job.strict:
                    raise DataError(f"{line.file}:{line.number}: {error}") from error
                count.rejected.append({"file": str(line.file), "line": line.number, "reason": str(error)})
                continue
            writer.write(sample.key, record=sample.record, media=sample.media)
            count.samples += 1
    return vars(count)


def _make_sample(line: Line, job: ShardJob, known: bool) -> Sample:
    """The sample of a line, its media decoded unless it is known to be good, and encoded anew where that is wanted."""
    sample = check_line(line, media_root=job.media_root, decode=not known)
    media = {kind: [job.reencode(kind, file) for file in files] for kind, files in sample.media.items()}
    return replace(sample, media=media)


def _stamp(job: ShardJob) -> dict[str, Any]:
    return {
        "samples_per_shard": job.samples_per_shard,
        "media": str(job.media_root.resolve()),
        "reencode": vars(job.reencode),
        "files": [[key_stem(path), _digest(path)] for path in job.files],
    }


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error
