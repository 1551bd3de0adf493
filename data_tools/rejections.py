"""Samples that `import` and `shard` rejected, found from the shards that they became."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.importing import rejected_path
from data_tools.sharding import FILES, REJECTED
from megatron_vita.data.shards.storage import Location

VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|\S*\.(?:[a-zA-Z]{2,4}\d?)\b|\d+(?:\.\d+)?""")
"""Parts that differ between two rejections for one reason: names, paths and numbers."""


@dataclass(frozen=True, kw_only=True)
class Rejections:
    """Samples rejected, by reason with names and numbers left out, each with one in full."""

    total: int
    reasons: list[tuple[str, int, str]]  # reason, samples, one in full; the most frequent first


def read_rejections(shards: Sequence[Location]) -> Rejections:
    """Collect the rejections listed beside shards, and beside the JSONL files of these shards."""
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for tool, place, reason in _entries(shards):
        kind = f"{tool}: {VARIABLE.sub('…', reason)}"
        reasons[kind] += 1
        examples.setdefault(kind, f"{place}: {reason}")
    ordered = [(kind, count, examples[kind]) for kind, count in reasons.most_common()]
    return Rejections(total=reasons.total(), reasons=ordered)


def _entries(shards: Sequence[Location]) -> Iterator[tuple[str, str, str]]:
    """(tool, place, reason) of each."""
    for folder in sorted({shard.parent for shard in shards if isinstance(shard, Path)}):
        for entry in _lines(folder / REJECTED):
            yield "shard", f"{entry['file']}:{entry['line']}", entry["reason"]
        # The JSONL files of the shards may have been imported: their rejections lie beside them.
        for file in _lines(folder / FILES):
            for entry in _lines(rejected_path(Path(file["file"]))):
                yield "import", f"{entry['source']} {entry['place']}", entry["reason"]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
