"""Plain webdataset tars: images or videos with a caption or a conversation; see
`megatron_vita/data/samples/third_party.py`."""

from collections.abc import Iterator
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
    """Tars."""
    return find_files(paths, ".tar")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The samples of a tar."""
    rule = read_rule(source.parent)
    reader = ShardReader()
    prompt = rule.prompt if setting.prompt is None else setting.prompt
    rule = replace(rule, prompt=prompt, ignore=(*rule.ignore, *setting.ignore))
    for number, sample in enumerate(scan_shard(source)):
        make = partial(
            _sample, sample, source=source, number=number, reader=reader, rule=rule, setting=setting
        )
        last = max((member.offset + member.size for member in sample.members.values()), default=0)
        yield Candidate(
            f"sample {sample.key}", refuse(sample.fault) if sample.fault else make, last
        )
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
        # Named by number: a member's own name may lead anywhere.
        paths = [
            write_medium(
                read_member(name),
                source=source,
                name=f"{number:08d}-{i if field == 'images' else f'video{i}'}",
                setting=setting,
            )
            for i, name in enumerate(names)
        ]
        record |= {field: paths} if paths else {}
    return {"id": sample.key, **record}
