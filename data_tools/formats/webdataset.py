"""Plain webdataset tars: images or videos with a caption or a conversation.

The mapping of members is that of `megatron_vita/data/samples/third_party.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.formats.base import Candidate, Setting, find_files, refuse, write_medium
from megatron_vita.data.samples.media_fields import FIELDS
from megatron_vita.data.samples.third_party import MemberRule, read_rule, record_of_members
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.tar import ScannedSample, scan_shard
from megatron_vita.media.kinds import HEAD


def list_sources(paths: list[Path]) -> list[Path]:
    """List tars."""
    return find_files(paths, ".tar")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """Yield the samples of a tar."""
    rule = read_rule(source.parent)
    # Outlives the generator's steps: members are read when a candidate is made.
    reader = ShardReader()
    if setting.prompt is not None:
        rule = replace(rule, prompt=setting.prompt)
    rule = replace(rule, ignore=(*rule.ignore, *setting.ignore))
    for number, sample in enumerate(scan_shard(source)):
        make: Callable[[], dict[str, Any]] = partial(
            _sample, sample, source=source, number=number, reader=reader, rule=rule, setting=setting
        )
        if sample.fault:
            make = refuse(sample.fault)
        last = max((member.offset + member.size for member in sample.members.values()), default=0)
        yield Candidate(f"sample {sample.key}", make, last)
    reader.close()


def _sample(
    sample: ScannedSample,
    *,
    source: Path,
    number: int,
    reader: ShardReader,
    rule: MemberRule,
    setting: Setting,
) -> dict[str, Any]:
    def read_member(name: str) -> bytes:
        return reader.read(source, member=sample.members[name], shard_size=source.stat().st_size)

    def read_head(name: str) -> bytes:
        member = sample.members[name]
        head = member._replace(size=min(member.size, HEAD))
        return reader.read(source, member=head, shard_size=source.stat().st_size)

    names_of = list(sample.members)
    record = record_of_members(names_of, read_member, rule=rule, read_head=read_head)
    for field in FIELDS:
        names = record.pop(field, [])
        # Named by number: a member's own name may lead out of the folder.
        prefix = f"{number:08d}-"
        if field == "videos":
            prefix += "video"
        paths = [
            write_medium(read_member(name), source=source, name=f"{prefix}{i}", setting=setting)
            for i, name in enumerate(names)
        ]
        if paths:
            record[field] = paths
    return {"id": sample.key, **record}
