"""Members of other makers' shards, and what an index made of each kind."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_vita.data.samples.media_fields import FIELDS
from megatron_vita.data.samples.third_party import RULE_FILE, read_rule, suffix_of, text_suffixes
from megatron_vita.data.shards.index import SampleIndex, find_index, read_index

IGNORED = "ignored"


def describe_members(shards: Sequence[Path], text: Mapping[str, str]) -> Iterator[str]:
    """A line for each folder of other makers' shards: suffixes of members by what they became, with
    their counts in its first shard."""
    # Reversed, so that the first shard of a folder is the one that remains.
    firsts = {shard.parent: shard for shard in reversed(shards)}
    for folder, shard in sorted(firsts.items()):
        roles = count_members(
            read_index(find_index(shard, text)[0]), texts=text_suffixes(read_rule(folder))
        )
        if roles:
            said = "; ".join(f"{role}: {_listed(suffixes)}" for role, suffixes in roles.items())
            yield f"{shard}: {said}; {folder / RULE_FILE} may say otherwise"


def count_members(index: SampleIndex, *, texts: Sequence[str]) -> dict[str, Counter[str]]:
    """Count how often each suffix became an image, a video, a text, or nothing, in foreign samples."""
    roles: dict[str, Counter[str]] = defaultdict(Counter)
    for row in map(index.row, range(len(index))):
        # Samples in our own format name their members by kind.
        if not row.record:
            continue
        record = json.loads(row.record)
        media = {name: field for field in FIELDS for name in record.get(field) or ()}
        for name in row.members:
            suffix = suffix_of(name)
            role = media.get(name) or ("text" if suffix in texts else IGNORED)
            roles[role][suffix] += 1
    return {role: roles[role] for role in (*FIELDS, "text", IGNORED) if role in roles}


def _listed(suffixes: Counter[str]) -> str:
    return ", ".join(f"{suffix} ({count:,})" for suffix, count in suffixes.most_common())
