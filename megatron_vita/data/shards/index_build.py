"""Construction of a shard's index, the only place that reads whole shards."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_vita.data.samples.media_fields import FIELDS
from megatron_vita.data.samples.records import (
    encode_record,
    is_pair,
    is_raw_text,
    parse_record,
    pieces_of_sample,
)
from megatron_vita.data.samples.rows import Member
from megatron_vita.data.samples.third_party import (
    MemberRule,
    read_rule,
    record_of_members,
    rule_stamp,
)
from megatron_vita.data.shards.index import SCHEMA, IndexHeader, SampleIndex, text_stamp
from megatron_vita.data.shards.quarantine import Entry, Quarantine, read_quarantine
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.tar import ScannedSample, scan_shard
from megatron_vita.errors import DataError
from megatron_vita.media.images import image_size
from megatron_vita.media.kinds import HEAD, kind_of_name
from megatron_vita.media.video import probe_video
from megatron_vita.text.chat_format import ChatFormat

Attempt = Callable[[Callable[[bool], Any]], Any]
"""Runs an action that reads perhaps damaged data; its argument: the data is known to be good."""


def build_index(shard: Path, chat: ChatFormat) -> SampleIndex:
    """Scan a shard and build its index, without the samples in its quarantine.

    Raises:
        DataError: naming shard and key of a sample that cannot be read.
    """
    index, quarantine = build_sound_index(shard, chat)
    for entry in quarantine.entries:
        if entry.by == "index":
            raise DataError(entry.reason)
    return index


def build_sound_index(
    shard: Path,
    chat: ChatFormat,
    *,
    attempt: Attempt = lambda action: action(False),
) -> tuple[SampleIndex, Quarantine]:
    """Build an index as `build_index`, leaving out samples that cannot be read.

    Returns:
        The index, and the shard's quarantine with the samples left out.
    """
    quarantine = read_quarantine(shard)
    scanned = list(scan_whole(shard, attempt))
    known = _Known(quarantine, scanned)
    reader = _Reader(shard, chat)
    bad = list[Entry]()
    rows = []
    for sample, error in scanned:
        if sample in known:
            continue
        try:
            if error:
                raise DataError(error)
            rows.append(attempt(partial(reader.columns, sample)))
        except DataError as reason:
            bad.append(Entry("index", printable(sample.key), str(reason)))
    reader.close()
    # Entries of `validate` stay; those of an earlier index are found again if they still hold.
    quarantine = quarantine.replaced("index", bad)
    made_with = {
        "rule": rule_stamp(reader.rule),
        "left_out": quarantine.stamp(),
        **text_stamp(chat),
    }
    return _as_index(rows, quarantine.shard_size, made_with), quarantine


def scan_whole(shard: Path, attempt: Attempt) -> Iterator[tuple[ScannedSample, str]]:
    """Yield the samples of a shard with a fault or ""; last, with an empty key, a failure of the
    scan."""
    samples, end = attempt(partial(_scan, shard))
    yield from samples
    if end:
        yield ScannedSample("", {}), end


def printable(key: str) -> str:
    """Escape the parts of a key that are not UTF-8."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")


def parse_sample(
    sample: ScannedSample, read: Callable[[Member], bytes], rule: MemberRule
) -> tuple[dict[str, Any], bool]:
    """Parse a sample's record.

    Returns:
        The record, and whether it is foreign: built of its members, not stored as `{key}.json`.
    """
    name = f"{sample.key}.json"

    def read_member(name: str) -> bytes:
        return read(sample.members[name])

    def read_head(name: str) -> bytes:
        member = sample.members[name]
        return read(member._replace(size=min(member.size, HEAD)))

    # A plain webdataset, too, may have a member KEY.json: only its content shows whose it is.
    if name in sample.members and _is_own(data := read_member(name)):
        return parse_record(data, name), False
    names = list(sample.members)
    return record_of_members(names, read_member, rule=rule, read_head=read_head), True


def _scan(shard: Path, _: bool) -> tuple[list[tuple[ScannedSample, str]], str]:
    found: list[tuple[ScannedSample, str]] = []
    try:
        for sample in scan_shard(shard):
            fault = ""
            if sample.fault:
                fault = f"{shard} sample {printable(sample.key)}: {sample.fault}"
            found.append((sample, fault))
    except DataError as error:
        return found, str(error)
    return found, ""


def _is_own(data: bytes) -> bool:
    """Return true for a JSON record as `SampleWriter` writes it, which names its own media."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    return all(isinstance(record.get(field), list) for field in FIELDS)


class _Known:
    """Samples quarantined by `validate`.

    If samples share a key, an entry belongs to the one whose scan fault ends its reason, else to
    the one without a fault.
    """

    def __init__(
        self, quarantine: Quarantine, scanned: Sequence[tuple[ScannedSample, str]]
    ) -> None:
        self._reasons = defaultdict[str, list[str]](list)
        for entry in quarantine.entries:
            if entry.by == "validate":
                self._reasons[entry.key].append(entry.reason)
        self._faults = tuple({sample.fault for sample, _ in scanned if sample.fault})

    def __contains__(self, sample: ScannedSample) -> bool:
        reasons = self._reasons.get(printable(sample.key), [])
        if sample.fault:
            return any(reason.endswith(sample.fault) for reason in reasons)
        return any(not reason.endswith(self._faults) for reason in reasons)


class _Reader:
    """Reader of the samples of one shard."""

    def __init__(self, shard: Path, chat: ChatFormat) -> None:
        self._shard = shard
        self._chat = chat
        self._size = shard.stat().st_size
        self.rule = read_rule(shard.parent)
        self._reader = ShardReader()
        self.close = self._reader.close

    def columns(self, sample: ScannedSample, _: bool) -> dict[str, Any]:
        """Row of the index for a sample; raises DataError naming shard and key."""
        name = f"{self._shard} sample {sample.key}"

        def read_member(member: Member) -> bytes:
            return self._reader.read(self._shard, member=member, shard_size=self._size)

        def read(member: str) -> bytes:
            return read_member(sample.members[member])

        try:
            record, is_foreign = parse_sample(sample, read_member, self.rule)
            kinds, tokens = pieces_of_sample(encode_record(record, self._chat))
            check_members(record, sample, is_foreign=is_foreign)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        # The shard holds no record of ours then: readers take it from the index.
        stored = ""
        if is_foreign:
            stored = json.dumps(record, sort_keys=True)
        sizes = [image_size(read(member), f"{self._shard} {member}") for member in record["images"]]
        videos = [
            probe_video(read(member), f"{self._shard} {member}") for member in record["videos"]
        ]
        # Both conversations of a pair show its media.
        if is_pair(record):
            sizes = sizes * 2
            videos = videos * 2
        return {
            "key": sample.key,
            "is_text": is_raw_text(record),
            "record": stored,
            "piece_kinds": [int(kind) for kind in kinds],
            "piece_tokens": tokens,
            "image_widths": [width for width, _ in sizes],
            "image_heights": [height for _, height in sizes],
            "video_durations": [video.duration for video in videos],
            "video_fps": [video.fps for video in videos],
            "video_frames": [video.frames for video in videos],
            "member_names": list(sample.members),
            "member_offsets": [member.offset for member in sample.members.values()],
            "member_sizes": [member.size for member in sample.members.values()],
        }


def check_members(record: dict[str, Any], sample: ScannedSample, *, is_foreign: bool) -> None:
    """Check the media names of a valid record against the members of its sample.

    Raises:
        DataError: it names a medium that is not a member, or is ours and omits one that is.
    """
    for field in ("images", "videos"):
        record[field] = record.get(field) or []
        for name in record[field]:
            if not isinstance(name, str) or name not in sample.members:
                raise DataError(f"{field} names {name!r:.200}, which the shard does not hold")
    media = [name for name in sample.members if kind_of_name(name)]
    named = {*record["images"], *record["videos"]}
    if not is_foreign and (other := next((name for name in media if name not in named), None)):
        raise DataError(f"its record does not name {other}, a medium that it comes with")


def _as_index(
    rows: list[dict[str, Any]], shard_size: int, made_with: dict[str, str]
) -> SampleIndex:
    # Of the rows, not of the file: Parquet's bytes depend on the version of pyarrow.
    content = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    header = IndexHeader(
        shard_size=shard_size,
        samples=len(rows),
        content=content,
        tokenizer=made_with["tokenizer"],
        template=made_with["template"],
        media_format=made_with["media_format"],
        rule=made_with["rule"],
        left_out=made_with["left_out"],
    )
    return SampleIndex(pa.Table.from_pylist(rows, schema=SCHEMA), header=header)
