"""Validation of shards: decodes all media in processes that may be killed, and lists damage."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.planning import find_all_shards
from data_tools.workers.pool import SampleGuard, WorkerOptions, run_tasks
from data_tools.workers.progress import progress_bar
from megatron_vita.config import MediaConfig, Recipe, load_recipe
from megatron_vita.data.datasets import find_shards
from megatron_vita.data.samples.records import check_record
from megatron_vita.data.samples.rows import Member
from megatron_vita.data.samples.third_party import MemberRule, read_rule
from megatron_vita.data.shards.index_build import (
    check_members,
    parse_sample,
    printable,
    scan_whole,
)
from megatron_vita.data.shards.quarantine import (
    Entry,
    Quarantine,
    quarantine_path,
    read_quarantine,
    write_quarantine,
)
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.storage import Location
from megatron_vita.data.shards.tar import ScannedSample
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import remove_abandoned
from megatron_vita.media.images import open_image
from megatron_vita.media.video import decode_frames, frame_times, probe_video

FRAMES_AT_ONCE = 64
FRAME_SIDE = 16  # frames are decoded in full, but need not be kept in full
USABLE = "usable, with frames in place of damaged ones: "
"""Beginning of the reason of a step whose sample remains usable."""


class Sampling(NamedTuple):
    """Frame sampling of videos, as in a recipe."""

    max_fps: float
    max_frames: int


class ValidateTask(NamedTuple):
    """One shard to validate, and the frame samplings of its videos, ascending."""

    shard: Path
    samplings: list[Sampling]


@dataclass(frozen=True)
class Validation:
    """Result of a validation.

    Attributes:
        samples: number of samples.
        bad: entry of each bad sample, including those that `index` listed.
        usable: entry of each sample that is good except for frames of its videos.
    """

    samples: int
    bad: list[tuple[Path, Entry]]
    usable: list[tuple[Path, Entry]]


def find_targets(targets: list[str]) -> list[ValidateTask]:
    """Named shards, or those of a recipe with overrides, with the samplings of their datasets.

    Raises:
        ConfigError: for anything else.
    """
    if targets[0].endswith((".yaml", ".yml")):
        return _recipe_targets(load_recipe(Path(targets[0]), targets[1:]))
    shards = [Path(target) for target in targets]
    for target in shards:
        if target.suffix != ".tar" or not target.is_file():
            raise ConfigError(f"{target}: one recipe (.yaml) or shards (.tar) are needed")
    return [
        # Shards alone name no recipe: the defaults of recipes decide what is sampled.
        ValidateTask(shard, [Sampling(MediaConfig.max_fps, MediaConfig.max_frames)])
        for shard in shards
    ]


def _recipe_targets(recipe: Recipe) -> list[ValidateTask]:
    shards = find_all_shards(recipe)
    samplings = defaultdict[Location, set[Sampling]](set)
    # Datasets may share a shard and sample its videos differently.
    for dataset in (*recipe.data.train, *recipe.data.validation):
        fps = dataset.max_fps or recipe.media.max_fps
        frames = dataset.max_frames or recipe.media.max_frames
        for shard in find_shards(dataset):
            samplings[shard].add(Sampling(fps, frames))
    return [ValidateTask(shard, sorted(samplings[shard])) for shard in shards]


def validate_shards(targets: Sequence[ValidateTask], *, options: WorkerOptions) -> Validation:
    """Decode every image and every frame that may be sampled, unless the shard was validated so
    before.

    Damage is listed in the shard's quarantine; nothing is deleted.

    Raises:
        DataError: a shard changed meanwhile.
    """
    tasks = [task for target in targets if (task := _with_earlier(target))]
    size = sum(task.shard.stat().st_size for task in tasks)
    with progress_bar("validate", total=size, unit="B") as bar:
        for _ in run_tasks(_validate_shard, tasks, options=options, on_advance=bar.update):
            pass
    remove_abandoned([quarantine_path(target.shard) for target in targets])
    lists = {target.shard: read_quarantine(target.shard) for target in targets}
    samples = sum(_samples(shard, found) for shard, found in lists.items())
    # By key, since `index` and `validate` may both list a sample.
    bad = {
        (shard, entry.key): (shard, entry)
        for shard, found in lists.items()
        for entry in found.entries
    }
    usable = [
        (shard, Entry("validate", key, reason))
        for shard, found in lists.items()
        for key, reason in (found.validated or {}).get("usable", [])
    ]
    return Validation(samples, list(bad.values()), usable)


def _samples(shard: Path, found: Quarantine) -> int:
    if found.validated is None:
        # The quarantine of a changed shard is void, and with it what was just written.
        raise DataError(f"{shard}: it changed while it was decoded; run validate again")
    return int(found.validated["samples"])


def _with_earlier(target: ValidateTask) -> ValidateTask | None:
    """Add the samplings of earlier validations, whose findings would else be lost; None if all
    done."""
    earlier = (read_quarantine(target.shard).validated or {}).get("samplings", [])
    done = {Sampling(*sampling) for sampling in earlier}
    wanted = set(target.samplings)
    if wanted <= done:
        return None
    return ValidateTask(target.shard, sorted(wanted | done))


def _validate_shard(task: ValidateTask, guard: SampleGuard) -> None:
    checker = _Checker(task, guard)
    bad = list[Entry]()
    samples = 0
    position = 0
    for sample, error in scan_whole(task.shard, guard.run):
        # An empty key is a failure of the scan, not a sample.
        if sample.key:
            samples += 1
        try:
            if error:
                raise DataError(error)
            checker.check(sample)
        except DataError as reason:
            bad.append(Entry("validate", printable(sample.key), str(reason)))
        # In bytes of the tar up to the last member; a sample's members may lie apart, so that
        # progress could go back.
        end = max(
            (member.offset + member.size for member in sample.members.values()), default=position
        )
        guard.advance(max(end - position, 0))
        position = max(end, position)
    checker.close()
    # Read now, not at the beginning: `index` may have listed samples meanwhile, which stay.
    found: Quarantine = read_quarantine(task.shard)
    validated: dict[str, Any] = {
        "samplings": [list(sampling) for sampling in task.samplings],
        "samples": samples,
    }
    if checker.usable:
        validated["usable"] = [[printable(key), why] for key, why in checker.usable.items()]
    write_quarantine(found.replaced("validate", bad, validated=validated), task.shard)


class _Checker:
    """Decodes the samples of a shard in steps: each image, and some frames of each video."""

    def __init__(self, task: ValidateTask, guard: SampleGuard) -> None:
        self._shard = task.shard
        self._samplings = task.samplings
        self._guard = guard
        self._size = task.shard.stat().st_size
        self._rule: MemberRule = read_rule(task.shard.parent)
        self._reader = ShardReader()
        self.usable: dict[str, str] = {}  # reasons by key
        self.close = self._reader.close

    def check(self, sample: ScannedSample) -> None:
        """Decode a sample; one with replaced frames is noted in `usable`.

        Raises:
            DataError: naming shard and key or member that cannot be decoded.
        """
        record = self._guard.run(partial(self._record, sample))
        for name in record["images"]:
            self._guard.run(partial(self._image, sample, name))
        for name in record["videos"]:
            times = self._guard.run(partial(self._times, sample, name))
            # In chunks, since the time limit is for a step: a long video may take longer.
            for chunk in itertools.batched(times, FRAMES_AT_ONCE):
                self._check_frames(sample, name, chunk)

    def _check_frames(self, sample: ScannedSample, name: str, times: Sequence[float]) -> None:
        try:
            self._guard.run(partial(self._frames, sample, name, times))
        except DataError as error:
            if not str(error).startswith(USABLE):
                raise
            # The first reason is enough: a damaged video fails in many chunks.
            self.usable.setdefault(sample.key, str(error).removeprefix(USABLE))

    def _record(self, sample: ScannedSample, known: bool) -> dict[str, Any]:
        try:
            record, is_foreign = parse_sample(sample, self._read_part, self._rule)
            check_record(record)
            check_members(record, sample, is_foreign=is_foreign)
        except DataError as error:
            raise DataError(f"{self._shard} sample {sample.key}: {error}") from error
        return record

    def _image(self, sample: ScannedSample, name: str, known: bool) -> None:
        if not known:
            open_image(self._read(sample, name), f"{self._shard} {name}")

    def _times(self, sample: ScannedSample, name: str, known: bool) -> list[float]:
        info = probe_video(self._read(sample, name), f"{self._shard} {name}")
        # A set, since samplings of several datasets share times.
        return sorted(
            {
                time
                for sampling in self._samplings
                for time in frame_times(info, **sampling._asdict())
            }
        )

    def _frames(
        self, sample: ScannedSample, name: str, times: Sequence[float], known: bool
    ) -> None:
        if known:
            return
        data = self._read(sample, name)
        reasons = list[str]()
        decode_frames(
            data,
            f"{self._shard} {name}",
            times=times,
            tile_size=FRAME_SIDE,
            report=lambda _, reason: reasons.append(reason),
        )
        if reasons:
            # As an error, so that it is the outcome of the step if the task is repeated.
            raise DataError(USABLE + reasons[0])

    def _read(self, sample: ScannedSample, name: str) -> bytes:
        return self._read_part(sample.members[name])

    def _read_part(self, part: Member) -> bytes:
        return self._reader.read(self._shard, member=part, shard_size=self._size)
