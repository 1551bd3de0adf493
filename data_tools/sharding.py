"""From JSONL files to shards, one shard after another, so that an interrupted run goes on where it stopped.

A folder holds one dataset: `NAME-000000.tar`, ..., `progress.jsonl` (what the shards are made of, then a line for each
finished one) and `rejected.jsonl` (a line for each sample left out). Shard i is made of the i-th run of
`samples_per_shard` lines, whether or not they are good, so no shard depends on another.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.samples import Line, check_line, key_stem, read_lines
from megatron_vita.data.shards import SampleWriter
from megatron_vita.errors import ConfigError, DataError

PROGRESS, REJECTED = "progress.jsonl", "rejected.jsonl"
Rejection = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What is to become shards, and where."""

    files: list[Path]
    media_root: Path
    out: Path
    samples_per_shard: int
    strict: bool

    def shard_path(self, shard: int) -> Path:
        """Where shard number `shard` goes; the folder's name is the dataset's."""
        return self.out / f"{self.out.resolve().name}-{shard:06d}.tar"


@dataclass
class ShardCount:
    """What became of the lines of one shard, or of all."""

    samples: int
    rejected: list[Rejection]


def make_shards(job: ShardJob) -> ShardCount:
    """Writes the shards that are not there yet, and `rejected.jsonl`. Gives the counts of all, also of earlier runs.

    A bad sample is left out, its file, line and reason listed. With `strict` the first one is a DataError that names
    file and line, and its shard is not written. ConfigError if the folder holds shards of other inputs.
    """
    _check_job(job)
    job.out.mkdir(parents=True, exist_ok=True)
    finished = _read_progress(job)
    total = ShardCount(0, [])
    lines = tqdm(read_lines(job.files), desc=str(job.out), unit=" lines", mininterval=1)
    with open(job.out / PROGRESS, "a") as progress, open(job.out / REJECTED, "w") as rejected:
        for shard, batch in enumerate(_chunks(lines, job.samples_per_shard)):
            count = finished.get(shard)
            if count is None or not job.shard_path(shard).exists():
                count = _write_shard(job, shard, batch)
                _append(progress, [{"shard": shard, **vars(count)}])
            elif job.strict and count.rejected:
                raise DataError("{file}:{line}: {reason}".format(**count.rejected[0]))
            _append(rejected, count.rejected)
            total = ShardCount(total.samples + count.samples, total.rejected + count.rejected)
    return total


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


def _write_shard(job: ShardJob, shard: int, lines: list[Line]) -> ShardCount:
    count = ShardCount(0, [])
    with SampleWriter(job.shard_path(shard)) as writer:
        for line in lines:
            try:
                sample = check_line(line, media_root=job.media_root)
            except DataError as error:
                if job.strict:
                    raise DataError(f"{line.file}:{line.number}: {error}") from error
                count.rejected.append({"file": str(line.file), "line": line.number, "reason": str(error)})
                continue
            writer.write(sample.key, record=sample.record, media=sample.media)
            count.samples += 1
    return count


def _read_progress(job: ShardJob) -> dict[int, ShardCount]:
    """Finished shards by number. Starts the file anew if nothing in it is finished; its last line may be torn."""
    path, stamp = job.out / PROGRESS, _stamp(job)
    entries = list(_whole_lines(path)) if path.exists() else []
    if len(entries) > 1 and entries[0] != stamp:
        field = next(name for name in stamp if entries[0].get(name) != stamp[name])
        raise ConfigError(
            f"{path}: it holds shards made with another {field} ({entries[0].get(field)}, now {stamp[field]}); "
            "choose another folder or delete this one"
        )
    entries = entries if len(entries) > 1 else [stamp]
    partial = path.with_name(PROGRESS + ".partial")
    with open(partial, "w") as file:
        _append(file, entries)
    os.replace(partial, path)
    return {entry["shard"]: ShardCount(entry["samples"], entry["rejected"]) for entry in entries[1:]}


def _stamp(job: ShardJob) -> dict[str, Any]:
    return {
        "samples_per_shard": job.samples_per_shard,
        "media": str(job.media_root.resolve()),
        "files": [[key_stem(path), _digest(path)] for path in job.files],
    }


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for text in path.read_bytes().splitlines(keepends=True):
            if text.endswith(b"\n"):
                yield json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}; delete this folder and make the shards again") from error


def _append(file: Any, entries: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    file.flush()


def _chunks(lines: Iterator[Line] | tqdm, size: int) -> Iterator[list[Line]]:
    iterator = iter(lines)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
